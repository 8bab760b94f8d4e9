"""The common base of txcore's own exceptions. Ground floor: it imports nothing."""


class TxcoreError(Exception):
    """What txcore raises of its own, to be caught in one place.

    Each of its classes is also one of Python's (ValueError, RuntimeError, AssertionError), so that
    code which knows nothing of txcore catches them too. An argument that is wrong raises a plain
    ValueError or TypeError, as everywhere in Python.

    Example:
      >>> import txcore as tx
      >>> from txcore.profiling import AutoShardingError
      >>> issubclass(AutoShardingError, tx.TxcoreError)
      True
      >>> issubclass(tx.CheckpointError, RuntimeError)
      True
    """
