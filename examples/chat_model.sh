#!/usr/bin/env bash
# A real chat model on everyday questions: SmolLM2-135M-Instruct answers eight of them five times, its answers become its
# datastore, and the questions are asked again, plainly, with chunks, and with chunks as drafts that the model verifies.
# Takes some ten minutes on two cores; run again, it goes on.
#
#   examples/chat_model.sh [FOLDER]    (default: output/chat_model)
set -euo pipefail
threads=${OMP_NUM_THREADS-}
# shellcheck source=examples/walk_through.sh
source "$(dirname "${BASH_SOURCE[0]}")/walk_through.sh"
if [[ -z $threads ]]; then
    unset OMP_NUM_THREADS # this model may gain from a second thread: the stages measure it
fi
out=$(output_folder chat_model "$@")
model=$out/smollm2
questions=(--prompt_file examples/chat_questions.json --chat --max_new_tokens 160 --temperature 0.7)

step "The model, which needs gguf and accelerate where the Hugging Face hub cannot be reached"
ensure_packages . gguf accelerate
run examples/get_smollm2.py --output_dir "$model"

step "It answers each of eight questions five times; the answers are saved as a corpus"
run eval.py --model_path "$model" "${questions[@]}" --save_dir "$out/answers" --gen_baseline_only --seed 1 \
    --num_return_sequences 5 --batch_size 8 --save_as_corpus "$out/corpus"

step "Chunks of those answers, θ and δ chosen by them, and the same questions with another seed: plainly and with chunks"
run run_pipeline.sh --input_files "$out/corpus/train.json" --validation_fraction 0 --test_fraction 0 --output_dir "$out" \
    --model_gen "$model" --min_length 1 --skip_first_tokens 0 --tok_prob_threshold 0.1 "${questions[@]}"

step "Once more, with chunks as drafts: the text is the model's own, token for token"
datastore=(--model_path "$model" --token_trie_dir "$out/tries" --dataset local --partition train --model_ds smollm2
    --model_gen smollm2 --tok_prob_threshold 0.1 --save_dir "$out/results/DSsmollm2_Hsmollm2_train_0.1")
run eval.py "${datastore[@]}" "${questions[@]}" --decoding verify

step "All three side by side, one answer with its chunks in colour, and a report"
run eval.py "${datastore[@]}" "${questions[@]}" --similarity_threshold auto --report "$out/report.html"

step "What to look at: FPS is the share of forward passes saved, TTS the time per token; the report shows every chunk"
echo "$out/report.html"
