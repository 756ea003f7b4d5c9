"""The folder in which every record of one training run lies: `Run`.

``records.jsonl`` holds one record a line and is only ever appended to; arrays too large for a line
lie in ``arrays/``. Each line is flushed, and an array is complete before its line is written, so a
run that was killed at any moment can be read up to its last record.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .batch import tree_map
from .errors import ArgumentError, RunError
from .record import Panel, Record, number_to_json, plain

if TYPE_CHECKING:
    import xarray

__all__ = ["Run", "write_whole"]

INLINE = 1024
"""Up to so many values stand in the line itself."""

TAG = "non-finite"
"""Key under which a float that JSON cannot hold stands beside text."""

FORMAT = 1


class Run:
    """Records of one training run, on disk.

    Use `open` to read and `create` to write.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._recipes: dict[str, str] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open an existing run.

        Args:
            path: The folder, or the one that holds it under the name ``mi``.

        Returns:
            The run.

        Raises:
            RunError: If there is none.
        """
        for folder in (Path(path), Path(path) / "mi"):
            if (folder / "records.jsonl").exists():
                return cls(folder)
        raise RunError(
            f"path: expected a run folder (it holds records.jsonl), got {os.fspath(path)!r}. "
            "Monitors write it to <log_dir>/mi."
        )

    @classmethod
    def create(cls, path: str | os.PathLike[str], info: Mapping[str, Any] | None = None) -> Run:
        """Make a run folder, or continue one.

        Args:
            path: The folder.
            info: Facts about the run, merged into ``run.json``.

        Returns:
            The run.

        Raises:
            RunError: If the folder cannot be written.
        """
        run = cls(path)
        try:
            (run.path / "arrays").mkdir(parents=True, exist_ok=True)
            run._repair()
            run.update_info(format=FORMAT, **(info or {}))
        except OSError as error:
            raise RunError(
                f"dirpath: expected a folder that can be written, got {os.fspath(path)!r} "
                f"({error.strerror or error}). Choose another with dirpath=… or the Trainer's "
                "default_root_dir."
            ) from error
        return run

    # ---------------------------------------------------------------- writing

    def write(self, record: Record) -> None:
        """Append a record; when this returns, it survives the death of the process.

        Args:
            record: What to keep. One with the same name, step and source replaces it on reading.
        """
        self._append([*self._recipe(record), self._line(record)])

    def write_all(self, records: Iterable[Record]) -> None:
        """Append several records in one write.

        Args:
            records: What to keep.
        """
        lines: list[str] = []
        for record in records:
            lines += self._recipe(record)
            lines.append(self._line(record))
        self._append(lines)

    def resume(self, step: int) -> None:
        """Say that training goes on from an earlier step.

        Nothing is deleted, but on reading live records of later steps count only if they are
        written after this: they belong to weights that no longer exist.

        Args:
            step: Optimizer steps taken in the checkpoint.
        """
        self._append([json.dumps({"resumed_at": step})])

    def _append(self, lines: list[str]) -> None:
        if not lines:
            return
        try:
            self._repair()
            # A lone surrogate, which UTF-8 refuses, is written as JSON's own escape. The file is
            # closed again, so that a run that is simply dropped leaves nothing open.
            with (self.path / "records.jsonl").open(
                "a", encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.write("".join(line + "\n" for line in lines))
        except OSError as error:
            raise RunError(
                f"run: expected a folder that can be written, got {os.fspath(self.path)!r} "
                f"({error.strerror or error}). Free some space, or choose another folder."
            ) from error

    def _repair(self) -> None:
        """End a line that a killed process left half written, so that the next stands alone."""
        path = self.path / "records.jsonl"
        path.touch()
        with path.open("rb+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def _recipe(self, record: Record) -> list[str]:
        recipe = json.dumps(_tagged(record.made_by), sort_keys=True)
        if self._recipes.get(record.measurement) == recipe:
            return []
        self._recipes[record.measurement] = recipe
        return [json.dumps({"recipe": record.measurement, "made_by": _tagged(record.made_by)})]

    def _line(self, record: Record) -> str:
        panel = record.panel
        entry = {
            "name": record.name,
            "step": record.step,
            "epoch": record.epoch,
            "samples": record.samples,
            "tokens": record.tokens,
            "weights": record.weights,
            "source": record.source,
            "axes": panel.axes,
            "shape": tuple(panel.values.shape),
            "dtype": str(panel.values.dtype)[6:],
            **self._values(record),
            "coords": _tagged(panel.coords),
            "unit": panel.unit,
            "convention": _tagged(panel.convention),
        }
        return json.dumps(_finite(entry), ensure_ascii=False, separators=(",", ":"))

    def _values(self, record: Record) -> dict[str, Any]:
        values = record.panel.values
        if values.numel() <= INLINE:
            return {"values": values.tolist()}
        stem = re.sub(r"[^\w.-]", "_", record.name.replace("/", "."))
        file = f"arrays/{stem}.{record.step}.{record.source}.npy"
        write_whole(self.path / file, lambda f: np.save(f, values.numpy()))
        return {"file": file}

    # ---------------------------------------------------------------- reading

    def records(self, name: str | None = None, *, source: str | None = None) -> list[Record]:
        """Return the records, each step once, in order of step.

        Args:
            name: Full name (``"head_scores/induction"``), or the measurement's alone; None: all.
            source: ``"live"`` or ``"sweep"``; None: both.

        Returns:
            Of several with one name, step and source the one written last.
        """
        found: dict[tuple[str, int, str], dict[str, Any]] = {}
        recipes: dict[str, Any] = {}
        for entry in self._entries():
            if "recipe" in entry:
                recipes[entry["recipe"]] = entry["made_by"]
            if "resumed_at" in entry:  # What came after that step was trained away.
                found = {k: v for k, v in found.items() if _stands(k, entry["resumed_at"])}
            if "name" not in entry:  # Nor is it a record where a later version wrote it.
                continue
            wanted = name is None or entry["name"] == name or entry["name"].startswith(f"{name}/")
            if wanted and source in (None, entry["source"]):
                key = (entry["name"], entry["step"], entry["source"])
                found[key] = {**entry, "made_by": recipes.get(entry["name"].split("/")[0], {})}
        ordered = sorted(found.items(), key=lambda item: item[0][1])
        return [self._record(entry) for _, entry in ordered]

    def names(self) -> list[str]:
        """Return the full names of all records, in order of their first appearance."""
        seen = (entry["name"] for entry in self._entries() if "name" in entry)
        return list(dict.fromkeys(seen))

    def dataset(self, measurement: str, *, source: str | None = None) -> xarray.Dataset:
        """Return all records of a measurement as labelled arrays.

        Args:
            measurement: Its name, for example ``"head_scores"``.
            source: ``"live"`` or ``"sweep"``; None takes live ones where there are any.

        Returns:
            One variable for each panel, with the dimension ``step`` before the panel's own axes,
            and the coordinates ``epoch``, ``samples`` and ``tokens`` along it. Steps at which the
            labels of an axis differ are aligned by label, and NaN stands where there is no value.

        Raises:
            ArgumentError: If there are no such records.
        """
        from .tables import to_dataset

        records = self.records(measurement, source=source)
        if source is None and any(r.source == "live" for r in records):
            records = [r for r in records if r.source == "live"]
        if not records:
            known = sorted({name.split("/")[0] for name in self.names()})
            raise ArgumentError.of(
                "measurement", expected=f"one of {known}", got=repr(measurement), do="See names()."
            )
        return to_dataset(records)

    def _entries(self) -> Iterator[dict[str, Any]]:
        path = self.path / "records.jsonl"
        if not path.exists():
            return
        torn = 0
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line, object_hook=_untagged)
                    complete = isinstance(entry, dict) and self._has_array(entry)
                except json.JSONDecodeError:
                    complete = False
                if complete:
                    yield entry
                else:
                    torn += 1
        if torn:
            warnings.warn(
                f"{path}: skipped {torn} unfinished line(s); the process was killed as it wrote.",
                stacklevel=3,
            )

    def _has_array(self, entry: Mapping[str, Any]) -> bool:
        return "file" not in entry or (self.path / str(entry["file"])).exists()

    def _record(self, entry: Mapping[str, Any]) -> Record:
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        if "file" in entry:
            values = torch.from_numpy(np.load(self.path / entry["file"])).to(dtype)
        else:
            values = _tensor(entry["values"], dtype).reshape(entry["shape"])
        panel = Panel(
            values, tuple(entry["axes"]), entry["coords"], entry["unit"], entry["convention"]
        )
        return Record(
            entry["name"],
            panel,
            step=entry["step"],
            epoch=entry["epoch"],
            samples=entry["samples"],
            tokens=entry["tokens"],
            weights=entry["weights"],
            source=entry["source"],
            made_by=entry["made_by"],
        )

    # ---------------------------------------------------------------- beside the records

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the run: model, sizes, versions, state."""
        path = self.path / "run.json"
        if not path.exists():
            return {}
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def update_info(self, **facts: Any) -> None:
        """Merge facts into ``run.json``; the file is replaced as a whole, never half written.

        Args:
            **facts: Plain JSON.
        """
        text = json.dumps(_finite({**self.info, **plain(facts)}), indent=1, ensure_ascii=False)
        write_whole(self.path / "run.json", lambda f: f.write(text.encode("utf-8")))

    @property
    def report(self) -> Path:
        """Where the HTML report of this run lies, or will."""
        return self.path / "report.html"

    def save_batch(self, batch: Any) -> None:
        """Keep the measured batch, for later sweeps.

        Args:
            batch: Containers of tensors. Mappings are kept as dicts, arrays as tensors.
        """
        built_in = tree_map(
            lambda v: torch.as_tensor(v) if isinstance(v, np.ndarray | np.generic) else v, batch
        )
        write_whole(self.path / "batch.pt", lambda f: torch.save(built_in, f))

    def batch(self) -> Any:
        """Return the measured batch on the CPU, or None if none was kept.

        Raises:
            RunError: If it holds more than tensors and built-in types.
        """
        path = self.path / "batch.pt"
        try:
            return torch.load(path, "cpu", weights_only=True) if path.exists() else None
        except pickle.UnpicklingError as error:
            raise RunError(
                f"batch: expected tensors and built-in types in {os.fspath(path)!r}, got python "
                "objects, which are not loaded from a file. Pass batch=… yourself."
            ) from error


def _stands(key: tuple[str, int, str], step: int) -> bool:
    return key[2] != "live" or key[1] <= step


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers see the old one or the whole new one.

    Args:
        path: Where to; missing folders are made.
        write: Writes into the file it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Turn non-finite floats into text: JSON has none, and strict readers refuse them."""
    if isinstance(value, float):
        return number_to_json(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _tagged(value: Any) -> Any:
    """Mark non-finite floats where text may stand as well: a token may read ``nan``."""
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: str(value)}
    if isinstance(value, Mapping):
        return {k: _tagged(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(v) for v in value]
    return value


def _untagged(value: dict[str, Any]) -> Any:
    return float(value[TAG]) if value.keys() == {TAG} else value


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype)
    return torch.tensor(values, dtype=dtype)
