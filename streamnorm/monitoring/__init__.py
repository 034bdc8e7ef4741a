"""Monitoring of training: pre-activations and memories, recorded and plotted.

The main function is ``streamnorm.monitor``; ``read`` reads the file that it writes.
"""

from streamnorm.monitoring.monitor import read as read
