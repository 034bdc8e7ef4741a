"""The statistics of testing: taken anew from data, and how far off they were.

``streamnorm.recalibrate`` is the function of this room that most will want; ``gap`` is the other one.
"""

from streamnorm.calibration.recalibrate import Gap as Gap
from streamnorm.calibration.recalibrate import gap as gap
