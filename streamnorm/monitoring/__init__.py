"""What a training looks like from inside: pre-activations and memories, recorded and drawn.

``streamnorm.monitor`` is the function of this room that most will want; ``read`` reads the file that it writes.
"""

from streamnorm.monitoring.monitor import read as read
