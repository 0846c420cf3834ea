"""What ``torch.compile`` needs of a machine."""

from vistok.errors import UserError


def check_compiler(option: str, device_type: str) -> None:
    """Raise UserError, naming the ``option`` that asks for it, where what is compiled would end in a traceback."""
    if device_type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(f"{option} needs a C++ compiler on a CPU: install one such as g++, or do without") from None
