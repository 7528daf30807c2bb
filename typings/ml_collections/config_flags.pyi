from typing import Any

def DEFINE_config_file(
    name: str,
    default: str | None = None,
    help_string: str = "",
    flag_values: Any = None,
    lock_config: bool = True,
    accept_new_attributes: bool = False,
    **arguments: Any,
) -> Any: ...
