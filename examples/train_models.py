"""Train the two embedded example models and their tokenizer on the train split of `python-docs`.

Writes  OUTPUT_DIR/{large,small}/  config, tokenizer and fp16 safetensors; prints the perplexity on each split.
Run     python examples/train_models.py --output_dir examples/models
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.text.python_docs import python_docs

VOCAB_SIZE = 4096
N_POSITIONS = 512
END_OF_TEXT = "<|endoftext|>"
SHAPES: dict[str, dict[str, Any]] = {
    "large": {"n_embd": 256, "n_layer": 6, "n_head": 4},
    "small": {"n_embd": 128, "n_layer": 3, "n_head": 4},
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that the two model folders go to")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES), help="which to train")
    parser.add_argument("--tokens", type=float, default=6e6, help="training tokens per model, repeats counted")
    parser.add_argument("--batch_size", type=int, default=4, help=f"sequences of {N_POSITIONS} tokens a step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="highest rate of the cosine schedule")
    parser.add_argument("--dropout", type=float, default=0.1, help="probability, on embeddings and residuals")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tokenizer = train_tokenizer(list(python_docs("train")))
    for name in args.models:
        tokenizer.save_pretrained(args.output_dir / name)
    streams = {split: token_stream(tokenizer, split) for split in ("train", "validation", "test")}
    for name in args.models:
        model = train(name, streams, args).half()
        model.save_pretrained(args.output_dir / name)
        perplexities = {split: round(perplexity(model.float(), stream), 2) for split, stream in streams.items()}
        print(f"{name}: {model.num_parameters():,} parameters, perplexity {perplexities}", flush=True)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 has it: every byte string has ids, and ids give back the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=N_POSITIONS
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    """(T,) int64: the documents of a split one after the other, each closed by the end-of-text token."""
    ids = tokenizer([text + END_OF_TEXT for text in python_docs(split)], verbose=False)["input_ids"]
    return torch.tensor([token for document in ids for token in document])


def train(name: str, streams: dict[str, torch.Tensor], args: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=N_POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=0.0,  # with it the attention leaves the fused kernel
        activation_function="gelu_pytorch_tanh",  # GPT-2's function as one kernel
        **SHAPES[name],
    )
    model = GPT2LMHeadModel(config).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    n_steps = math.ceil(args.tokens / (args.batch_size * N_POSITIONS))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, n_steps, pct_start=0.05)
    stream, started = streams["train"], time.perf_counter()
    for step in (bar := tqdm(range(n_steps), desc=f"training {name}", unit="step", mininterval=20)):
        starts = torch.randint(len(stream) - N_POSITIONS, (args.batch_size,))
        input_ids = torch.stack([stream[start : start + N_POSITIONS] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199 or step == n_steps - 1:
            validation = perplexity(model, streams["validation"])
            seconds = time.perf_counter() - started
            bar.write(
                f"{name} step {step + 1}: loss {loss:.3f}, validation perplexity {validation:.2f}, {seconds:.0f} s"
            )
    return model.eval()


@torch.inference_mode()
def perplexity(model: GPT2LMHeadModel, stream: torch.Tensor) -> float:
    """Over consecutive windows of N_POSITIONS tokens, the first token of each not counted."""
    was_training = model.training
    model.eval()
    windows = stream[: len(stream) // N_POSITIONS * N_POSITIONS].view(-1, N_POSITIONS)
    losses = [model(batch, labels=batch).loss * len(batch) for batch in windows.split(8)]
    model.train(was_training)
    return math.exp(sum(float(loss) for loss in losses) / len(windows))


if __name__ == "__main__":
    main()
