"""The commands of ``python -m vistok.eval``: each module has ``HELP``, ``EXAMPLES``, ``add_flags`` and ``run``."""
