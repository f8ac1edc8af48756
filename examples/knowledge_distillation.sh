#!/usr/bin/env bash
# Knowledge distillation, for perplexity: chunks to which the large example model gives a high probability help the small one. How high
# to be of a chunk by its similarity is fitted to validation text; test text says what came of it. Takes two minutes or
# so; run again, it goes on.
#
#   examples/knowledge_distillation.sh [FOLDER]    (default: output/knowledge_distillation)
set -euo pipefail
# shellcheck source=examples/walk_through.sh
source "$(dirname "${BASH_SOURCE[0]}")/walk_through.sh"
out=$(output_folder knowledge_distillation "$@")
small=examples/models/small
gamma=0.3

step "Chunks to which the large model gives a high probability, found by hidden states of the small one, which generates"
run run_pipeline.sh --quiet --model_ds examples/models/large --model_gen "$small" --max_passages 60 \
    --tok_prob_threshold "$gamma" --max_new_tokens 60 --output_dir "$out" --report "$out/report.html"

step "Perplexity of test text: the small model alone, with θ deciding about chunks, and with the fitted map"
run eval.py --quiet --model_path "$small" --token_trie_dir "$out/tries" --dataset python-docs --partition train \
    --tok_prob_threshold "$gamma" --model_ds large --model_gen small --save_dir "$out/perplexity" \
    --acceptance bernoulli --fit_acceptance "$out/data/validation.json" --perplexity_file "$out/data/test.json" \
    --sweep_similarity_threshold 0.8 0.9 0.95

step "What to look at: the column 'to base LM' is below 1 where chunks help, with its interval; the report shows texts"
echo "$out/report.html"
