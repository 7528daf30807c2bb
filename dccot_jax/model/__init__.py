"""The student: one config-driven decoder, its sharding table, its output head, and Hugging Face import and export."""
