"""Asks a checkpoint the evaluation scenes in vLLM: `python serve.py CHECKPOINT DTYPE SCENES FILE`.

A process of its own: vLLM sets up devices and processes that one interpreter has only once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from qvl_hydra.calibration.encode import load_processor, render
from qvl_hydra.calibration.record import Turn
from qvl_hydra.calibration.scenes import scene_examples

SEED = 1  # of the evaluation scenes
# Kernels for AMX refuse some widths of small models ("Expected N == BLOCK_N"); the others take every one.
torch.cpu._is_amx_tile_supported = lambda: False
# vLLM runs quantized experts where the processor has AMX; the kernels compute the same without.
for kernel in (cpu_moe.CPUExpertsInt8, cpu_moe.CPUExpertsFp8):
    kernel._supports_current_device = staticmethod(lambda: True)


def main(checkpoint: str, dtype: str, scenes: int, file: Path) -> None:
    """Write what vLLM made of the checkpoint: its layers' schemes, its answers, its log-probabilities."""
    processor = load_processor(checkpoint)
    vocabulary = processor.config.get_text_config().vocab_size
    model = LLM(
        checkpoint,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_logprobs=vocabulary,
        limit_mm_per_prompt={"image": 1, "video": 0},
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    questions, whole = [], []
    for example in scene_examples("evaluation", scenes, SEED):
        question, reply = render(processor, (Turn("user", (None, example.prompt)),), example.answer)
        asked, answered = (processor.tokenizer.encode(text, add_special_tokens=False) for text in (question, reply))
        image = {"image": example.image}
        questions.append(TokensPrompt(prompt_token_ids=asked, multi_modal_data=image))
        whole.append(TokensPrompt(prompt_token_ids=asked + answered, multi_modal_data=image))
    said = model.generate(questions, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    forced = model.generate(
        whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=vocabulary), use_tqdm=False
    )
    inner = model.llm_engine.model_executor.driver_worker.model_runner.model
    found = {
        "layers": {name: _scheme(layer) for name, layer in inner.named_modules() if hasattr(layer, "quant_method")},
        "answers": [item.outputs[0].text for item in said],
        "prompts": [list(item.prompt_token_ids) for item in forced],
        "log_probabilities": [_matrix(item.prompt_logprobs, vocabulary) for item in forced],
    }
    torch.save(found, file)


def _scheme(layer: object) -> str:
    """vLLM's name of how a layer computes: empty where it is not quantized."""
    method = type(getattr(layer, "quant_method", None)).__name__
    if method.endswith("MoEMethod"):  # which is the scheme itself
        return "" if method.startswith("Unquantized") else method.removeprefix("CompressedTensors")
    scheme = getattr(layer, "scheme", None)
    return "" if scheme is None else type(scheme).__name__.removeprefix("CompressedTensors")


def _matrix(positions: list[dict[int, object]], vocabulary: int) -> torch.Tensor:
    """Log-probabilities of every token after each but the last of a prompt: (token - 1, vocab)."""
    found = torch.full((len(positions) - 1, vocabulary), float("nan"))
    for row, position in zip(found, positions[1:], strict=True):
        for token, value in position.items():
            row[token] = value.logprob
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
