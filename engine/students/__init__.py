"""StudentNets that timm has not. Importing this package puts them into timm's registry.

`timm.create_model(name, num_classes=…, in_chans=…, drop_rate=…)` makes them like its own models.
"""

from mentorch.engine.students import inception_resnet_v2, paper, small
from mentorch.engine.students.registry import STUDENTS

__all__ = ["STUDENTS", "inception_resnet_v2", "paper", "small"]
