"""The trainers that nnU-Net finds by name (see ``nnunet_norm_trainers.py``)."""
