"""Memory of a training run: estimated part by part, planned for a budget, probed with one real step."""

from tunesmith.memory.estimate import Estimate, MemoryShape, PartShape, Setting, shape_of
from tunesmith.memory.plan import TrainingPlan, plan_training
from tunesmith.memory.probe import Probe, probe_step
from tunesmith.memory.work import Work

__all__ = [
    "Estimate",
    "MemoryShape",
    "PartShape",
    "Probe",
    "Setting",
    "TrainingPlan",
    "Work",
    "plan_training",
    "probe_step",
    "shape_of",
]
