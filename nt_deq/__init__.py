from nt_deq import _compat

_compat.install()
