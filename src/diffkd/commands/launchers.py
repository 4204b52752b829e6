"""Runs of a comparison or a study on a cluster: Ray's, or one of SLURM through submitit."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from diffkd.tasks.distributed import launcher as started_by

LauncherName = Literal["processes", "ray", "submitit"]
_TRIES = 3  # of a run whose worker was lost


def check_launcher(launcher: LauncherName, options: Mapping[str, Any] | None) -> None:
    """Check that a launcher can be used, before anything is trained.

    Raises:
        ImportError: if its library is not installed.
        ValueError: if options are given that no launcher takes.
    """
    if launcher == "processes":
        if options:
            raise ValueError(
                "launcher_options are for --launcher ray or submitit: give one of these, or leave them out"
            )
    elif find_spec(launcher) is None:
        raise ImportError(f"--launcher {launcher} needs {launcher}: pip install 'diffkd[cluster]'")


def check_started_once(command: str) -> None:
    """Raise ValueError if torchrun, srun or mpirun has started a command several times, each of which would do all."""
    found = started_by()
    if found is not None and found.processes > 1:
        raise ValueError(
            f"{found.name} started {found.processes} processes of `diffkd {command}`, each of which would do all of "
            "it: start one, which starts its runs itself"
        )


def on_cluster(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    out: Path,
    *,
    launcher: LauncherName,
    jobs: int | None,
    options: Mapping[str, Any] | None,
) -> Iterator[tuple[int, Any]]:
    """Call a function on a cluster, in working directories named as this one.

    A call whose worker or node is lost is repeated elsewhere, up to three times in all, so that the function must be
    able to go on with what it has left in `out`.

    Args:
        function: of a module that the workers can import.
        calls: arguments of each call.
        out: folder that all nodes must see.
        launcher: "ray" or "submitit".
        jobs: largest number of calls at the same time; None: as many as the cluster has room for.
        options: for Ray "address" of the cluster, and resources of each call such as "num_cpus" and "num_gpus"; for
            submitit "cluster" ("slurm" or "local"; by default SLURM where there is one) and its parameters, such as
            "slurm_partition", "timeout_min", "cpus_per_task", "gpus_per_node".

    Yields:
        Index and result of each call as it ends; the exception as result if it failed.

    Raises:
        ConnectionError: if there is no cluster at the address.
        ValueError: if an option is unknown or wrong.
    """
    call_all = _by_ray if launcher == "ray" else _by_submitit
    yield from call_all(_There(function, str(Path.cwd()), str(out.resolve())), calls, out, jobs, dict(options or {}))


class _There:
    """A function with the place that it was called from."""

    def __init__(self, function: Callable[..., Any], directory: str, out: str) -> None:
        self.function, self.directory, self.out = function, directory, out

    def __call__(self, *arguments: Any) -> Any:
        import torch

        if not Path(self.out).is_dir():
            raise FileNotFoundError(
                f"{socket.gethostname()} does not see {self.out}: give --out on storage that all nodes share"
            )
        if Path(self.directory).is_dir():
            os.chdir(self.directory)  # for the relative paths of the command line
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
        return self.function(*arguments)

    def checkpoint(self, *arguments: Any) -> Any:
        """Return what submitit queues anew when SLURM stops a job: the same, which goes on with its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def _by_ray(
    there: _There, calls: Sequence[tuple[Any, ...]], out: Path, jobs: int | None, options: dict[str, Any]
) -> Iterator[tuple[int, Any]]:
    import ray

    address = options.pop("address", None)
    paths = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=paths)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConnectionError(
            f"the Ray cluster {address or 'of this machine'} could not be reached ({reason}): start it with `ray start "
            "--head`, and give the address that this prints as --launcher_options='{address: ...}'"
        ) from error
    waiting = list(enumerate(calls))
    running: dict[Any, int] = {}
    try:
        try:
            remote = ray.remote(**{"max_retries": _TRIES - 1, **options})(_call)
        except (TypeError, ValueError) as error:
            raise ValueError(f"launcher_options: Ray does not take them ({error}): correct them") from error
        place = ray.put(there)
        while waiting or running:
            while waiting and (jobs is None or len(running) < jobs):
                index, arguments = waiting.pop(0)
                running[remote.remote(place, *arguments)] = index
            (ended,), _ = ray.wait(list(running))
            index = running.pop(ended)
            try:
                result = ray.get(ended)
            except ray.exceptions.RayError as error:
                result = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            yield index, result
    finally:
        for one in running:
            ray.cancel(one)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=60)  # a run that is stopped saves a checkpoint
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise OSError if nobody listens at an address HOST:PORT: Ray itself would try for minutes."""
    if address and re.fullmatch(r"[^/]+:\d+", address):
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _call(there: _There, *arguments: Any) -> Any:
    return there(*arguments)


def _by_submitit(
    there: _There, calls: Sequence[tuple[Any, ...]], out: Path, jobs: int | None, options: dict[str, Any]
) -> Iterator[tuple[int, Any]]:
    import submitit

    cluster = options.pop("cluster", None)
    try:
        executor = submitit.AutoExecutor(folder=out / "submitit", cluster=cluster)
        executor.update_parameters(**{"name": "diffkd", "timeout_min": 24 * 60, **options})
    except (ValueError, NameError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"launcher_options: submitit does not take them ({reason}): correct them") from error
    waiting = [(index, call, 1) for index, call in enumerate(calls)]
    running: dict[Any, tuple[int, tuple[Any, ...], int]] = {}
    try:
        while waiting or running:
            while waiting and (jobs is None or len(running) < jobs):
                index, arguments, tries = waiting.pop(0)
                running[executor.submit(there, *arguments)] = (index, arguments, tries)
            ended = next(submitit.helpers.as_completed(list(running), poll_frequency=1))
            index, arguments, tries = running.pop(ended)
            try:
                result = ended.result()
            except submitit.core.utils.FailedJobError as error:  # its message is a whole traceback
                result = RuntimeError((str(error).strip().splitlines() or ["it failed"])[-1])
            except submitit.core.utils.UncompletedJobError as error:  # nothing came back: its process was lost
                if tries < _TRIES:
                    waiting.append((index, arguments, tries + 1))
                    continue
                result = error
            yield index, result
    finally:
        for job in running:
            job.cancel()
