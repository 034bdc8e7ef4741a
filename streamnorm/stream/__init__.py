"""The stream: the memory of past statistics (paper, sections 3.3.1 and 3.3.2).

A rule defines how a state is updated, a memory holds the state. Imports torch and the checks alone.
"""

from streamnorm.stream.buffers import expect_replaceable as expect_replaceable
from streamnorm.stream.controlled import Controlled as Controlled
from streamnorm.stream.controlled import Lagging as Lagging
from streamnorm.stream.evidence import Pooled as Pooled
from streamnorm.stream.evidence import Residual as Residual
from streamnorm.stream.exponential import Exponential as Exponential
from streamnorm.stream.longshort import LongShort as LongShort
from streamnorm.stream.memory import Memory as Memory
from streamnorm.stream.memory import finite as finite
from streamnorm.stream.renorm import Renorm as Renorm
from streamnorm.stream.renorm import RenormGradient as RenormGradient
from streamnorm.stream.rule import CHUNK as CHUNK
from streamnorm.stream.rule import GradientRule as GradientRule
from streamnorm.stream.rule import Rule as Rule
from streamnorm.stream.rule import State as State
from streamnorm.stream.timed import TimedMemory as TimedMemory
