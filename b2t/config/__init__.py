"""The configuration: pydantic sections, YAML presets, dotted overrides.

Every component is built from its own section and sees nothing else. Batch size, accumulation,
precision, ZeRO stage and gradient clipping belong to the DeepSpeed file (`b2t.train.ds_config`)
and have no key here.
"""

from b2t.config.alert_rules import AlertRule, Condition
from b2t.config.explain import describe
from b2t.config.load import completed, load_config, preset_names
from b2t.config.model import (
    ModelConfig,
    QuantizerConfig,
)
from b2t.config.phases import (
    EarlyStoppingConfig,
    PhaseConfig,
    Schedule,
)
from b2t.config.sections import (
    CheckpointConfig,
    CodebookStartConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    MonitorConfig,
    OptimConfig,
    ProfileConfig,
    RunConfig,
    StabilityConfig,
    WandbConfig,
)
from b2t.model.objectives import COMPONENTS, Component, LossWeights
from b2t.quantize.options import TemperatureOptions

__all__ = [
    "AlertRule",
    "COMPONENTS",
    "CheckpointConfig",
    "CodebookStartConfig",
    "Component",
    "Condition",
    "Config",
    "DataConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "LogConfig",
    "LossWeights",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "PhaseConfig",
    "ProfileConfig",
    "QuantizerConfig",
    "RunConfig",
    "Schedule",
    "StabilityConfig",
    "TemperatureOptions",
    "WandbConfig",
    "completed",
    "describe",
    "load_config",
    "preset_names",
]
