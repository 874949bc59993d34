"""Train a model: `python train.py example/tiny-dpo.yml lr=2e-5`, or for several GPUs
`torchrun --nproc-per-node 8 train.py …`.

This file only wires the parts together; the update rule is in `algorithms/<name>.py`.
"""
import importlib
import sys
from dataclasses import asdict, replace

from data.errors import give_reason, notice, run_program
from engine import console
from engine.config import load_config
from engine.grid import grid_of, run_grid
from engine.help import help_for


def main(argv: list[str]) -> None:
    if text := help_for(argv):
        return print(text)
    if grid := grid_of(argv):
        sys.exit(run_grid(argv, grid))
    run_config = load_config(argv)
    # these imports take seconds, so they wait until the configuration is known to be good
    from engine import background, checkpoint, ranks
    from engine.build import build, stored_yaml
    from engine.directory import changed_rates, choose_directory
    from engine.dry_run import dry_run
    from engine.fingerprint import fingerprints
    from engine.logs import Run
    from engine.signals import Stopped

    common, config = run_config.common, run_config.config
    algorithm = importlib.import_module(f"algorithms.{common.algorithm}")
    if "dry-run" in run_config.flags:
        return dry_run(run_config, algorithm.DATA)
    ranks.start_processes(common.deterministic)
    rank, _ = ranks.distributed()
    run, code = None, 0
    try:
        # a run named as start model stands for its model of now, and a resumed run must start from the same
        start_model = ranks.from_main(checkpoint.model_path, common.model, notice)
        common = replace(common, model=start_model)
        config_yaml = stored_yaml(common, config)
        place = ranks.from_main(choose_directory, common.output, run_config.stem, common.resume, config_yaml)
        run = Run(place.directory, rank == 0, common.report_to, common.quiet)
        if place.finished:
            ranks.from_main(run.take_back)
            run.notice(f"{place.directory} is finished already: nothing is trained, nothing in it is touched")
            return run.summary(chat=algorithm.MODEL != "reward")
        if place.start:
            ranks.from_main(run.check_started, ranks.from_main(fingerprints, asdict(common) | asdict(config)))
            changed = ranks.from_main(changed_rates, place.directory, config_yaml)
            if changed:
                run.notice(changed)
        _, config, engine = build(run_config._replace(common=common), run, place.start)
        engine.saver.try_saving()
        algorithm.train(engine, config)
        engine.finish()
        ranks.from_main(run.summary, algorithm.MODEL != "reward")      # all leave together
    except Stopped as stop:
        background.wait()
        # resume=never would start another run, resume=PATH an older part of this one
        words = argv if common.resume == "auto" else [*argv, f"resume={place.directory}"]
        line = f"{stop}; continue with: {ranks.command(words)}"
        give_reason(line)
        ranks.from_main(run.notice, line)      # all wait: torchrun ends all when the first one leaves
        code = stop.exit_code
    finally:
        background.join()
        if background.fault and rank == 0:      # the run ends by another error
            notice(str(background.fault))
        if run:
            run.close()
    ranks.stop_processes()      # not after an error, which the other ranks may not have
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_program(main, console.close)
