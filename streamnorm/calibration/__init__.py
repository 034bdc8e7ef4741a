"""The statistics used in testing: recomputing them from data, and measuring how far off they are.

The main function is ``streamnorm.recalibrate``; the other one is ``gap``.
"""

from streamnorm.calibration.recalibrate import Gap as Gap
from streamnorm.calibration.recalibrate import gap as gap
