"""Train one of the bundled models from nothing, on one thread: `python scripts/train_bundled.py --model qwen2_5_vl`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from bundled_models.architecture import FAMILIES, build_model, build_tokenizer, save_processor
from bundled_models.finishing import finish
from bundled_models.training import Recipe, train

from qvl_hydra.calibration.encode import load_processor

SEEDS = {"qwen2_5_vl": 25, "qwen2_vl": 20, "qwen3_vl": 30}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=FAMILIES, required=True, help="model family")
    parser.add_argument("--steps", type=int, default=4500, help="training steps of 32 scenes each")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the finished checkpoint; what training leaves behind lies in its `training` folder, and a "
        "training that was cut off goes on from there",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    training = args.out / "training"
    training.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(args.model, tokenizer, SEEDS[args.model])
    recipe = Recipe(steps=args.steps, seed=SEEDS[args.model])
    train(model, tokenizer, recipe, training, report=lambda line: print(line, flush=True))
    save_processor(args.model, tokenizer, args.out)
    model.requires_grad_(False).save_pretrained(args.out)  # the config, which the processor is loaded beside
    finished, figures = finish(model, load_processor(args.out))
    finished.save_pretrained(args.out)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
