#!/usr/bin/env bash
# Self-distillation, for speed: a model answers prompts, its answers become its datastore, and the prompts are asked
# again with another seed, plainly and with chunks of those answers. Takes a minute or two; run again, it goes on.
#
#   examples/self_distillation.sh [FOLDER]    (default: output/self_distillation)
set -euo pipefail
# shellcheck source=examples/walk_through.sh
source "$(dirname "${BASH_SOURCE[0]}")/walk_through.sh"
out=$(output_folder self_distillation "$@")
model=examples/models/large

step "The model answers each of 16 prompts three times; the answers are saved as a corpus"
run eval.py --quiet --model_path "$model" --prompt_file examples/prompts.json --save_dir "$out/answers" \
    --gen_baseline_only --max_new_tokens 80 --temperature 0.7 --seed 1 --num_return_sequences 3 --batch_size 8 \
    --save_as_corpus "$out/corpus"

step "Chunks of those answers, and the same prompts with another seed"
run run_pipeline.sh --quiet --input_files "$out/corpus/train.json" --validation_fraction 0 --test_fraction 0 \
    --model_gen "$model" --min_length 1 --skip_first_tokens 8 --tok_prob_threshold 0.3 \
    --prompt_file examples/prompts.json --max_new_tokens 80 --temperature 0.7 --similarity_threshold 0.9 \
    --output_dir "$out" --report "$out/report.html"

step "What to look at: FPS is the share of forward passes saved, TTS the time per token; the report shows every chunk"
echo "$out/report.html"
