"""What a training needs and how long it takes, before any machine is there: `dccot estimate`."""
