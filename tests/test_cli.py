"""Every monitor can be built from YAML, in both Lightning packages."""

from __future__ import annotations

import importlib
from typing import Any

import cases
import pytest
import yaml
from cases import PACKAGES

from lightning_mi import NextToken

CALLBACKS = [
    {"class_path": "lightning_mi.callbacks.HeadMonitor", "init_args": {"every_n_train_steps": 7}},
    {
        "class_path": "lightning_mi.callbacks.SaliencyMonitor",
        "init_args": {"kind": "signed", "target": 3},
    },
    {
        "class_path": "lightning_mi.callbacks.IntegratedGradientsMonitor",
        "init_args": {
            "max_steps": 8,
            "at_steps": [1, 2],
            "target": {"class_path": "lightning_mi.LogitDifference", "init_args": {"other": 2}},
        },
    },
    {"class_path": "lightning_mi.callbacks.InfluenceMonitor", "init_args": {"candidates": 16}},
    {
        "class_path": "lightning_mi.callbacks.MeasurementMonitor",
        "init_args": {
            "measurements": [
                {
                    "class_path": "lightning_mi.attribution.Saliency",
                    "init_args": {"name": "second", "examples": 1},
                }
            ],
            "task": {"class_path": "lightning_mi.NextToken"},
            "on_validation": True,
        },
    },
    {
        "class_path": "lightning_mi.callbacks.ScheduledCheckpoint",
        "init_args": {"at_steps": "log", "every_n_train_steps": 50},
    },
    {"class_path": "lightning_mi.callbacks.WandbExtras", "init_args": {"artifact": False}},
]


@pytest.mark.parametrize("package", PACKAGES)
def test_callbacks_from_yaml(package: str, tmp_path: Any) -> None:
    pl = cases.lightning(package)
    cli = importlib.import_module(f"{package}.cli").LightningCLI

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()

    settings = {"trainer": {"callbacks": CALLBACKS, "accelerator": "cpu", "logger": False}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    built = cli(
        Model,
        args=["--config", str(path)],
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
    )
    ours = {type(c).__name__: c for c in built.trainer.callbacks}
    assert ours["HeadMonitor"].schedule.every_n_train_steps == 7
    assert ours["SaliencyMonitor"].measurements[0].kind == "signed"
    assert ours["SaliencyMonitor"].measurements[0].target == 3
    assert ours["IntegratedGradientsMonitor"].measurements[0].target.other == 2
    assert ours["MeasurementMonitor"].task == NextToken()
    assert ours["IntegratedGradientsMonitor"].schedule.at_steps == (1, 2)
    assert ours["InfluenceMonitor"].measurements[0].candidates == 16
    assert ours["MeasurementMonitor"].measurements[0].name == "second"
    assert ours["ScheduledCheckpoint"].schedule.at_steps == "log"
    assert (ours["WandbExtras"].alert, ours["WandbExtras"].artifact) == (True, False)
