"""The commands of ``nnunet-norm``, one per module: a docstring, ``add_arguments(parser)`` and ``run(args)``."""
