#!/usr/bin/env bash
# Expert chunks: a person marked the facts of a made-up staff directory, which no model can know. Sixteen questions
# about them go to the model alone and with those chunks. Takes a minute; run again, it goes on. expert_facts.py beside
# this file asks all questions, chooses θ on people held out and counts.
#
#   examples/expert_facts.sh [FOLDER]    (default: output/expert_facts_report)
set -euo pipefail
# shellcheck source=examples/walk_through.sh
source "$(dirname "${BASH_SOURCE[0]}")/walk_through.sh"
out=$(output_folder expert_facts_report "$@")
theta=0.572    # what expert_facts.py chose

step "Sixteen questions about four people of the directory"
mkdir -p "$out"
.venv/bin/python - "$out/questions.json" <<'END'
import json, sys

facts = json.load(open("examples/staff_directory.json"))[-16:]
questions = [fact["questions"]["its words"] for fact in facts]
json.dump(questions, open(sys.argv[1], "w"))
print("The directory says:", facts[0]["text"], "\nThe model is asked:", questions[0], "…")
END

step "The marked spans become chunks; the model answers greedily, without them and with them"
run run_pipeline.sh --quiet --input_files examples/staff_directory.json --validation_fraction 0 --test_fraction 0 \
    --chunk_source expert --prompt_file "$out/questions.json" --max_new_tokens 20 --temperature 0 \
    --similarity_threshold "$theta" --output_dir "$out" --report "$out/report.html"

step "What was asked, what the model says alone, what it says with the chunks, and what the directory says"
.venv/bin/python - "$out/results/DSlarge_Hlarge_train_0.1" "generation_t$theta" <<'END'
import json, sys

folder, with_chunks = sys.argv[1:]
facts = json.load(open("examples/staff_directory.json"))[-16:]
n_right = 0
for i, fact in enumerate(facts):
    question = fact["questions"]["its words"]
    texts = json.load(open(f"{folder}/prompt_{i}.json"))["generation"]
    alone, answer = (
        " ".join(texts[f"{run}_text"].removeprefix(question).split()) for run in ("baseline_generation", with_chunks)
    )
    n_right += fact["fact"] in answer
    print(f"{question[question.rindex(' the ') + 1 :]:28}{alone[:30]:32}{answer[:30]:32}{fact['fact']}")
print(f"With the chunks {n_right} of {len(facts)} are right.")
END

step "What to look at: the report shows each chunk with its similarity, where it is from and what else there was"
echo "$out/report.html"
