"""From torch's normalization layers to ours and back, into the layers before them, and freezing.

The functions are ``streamnorm.convert``, ``to_torch``, ``torch_state_dict``, ``fold_into``, ``freeze`` and
``unfreeze``.
"""
