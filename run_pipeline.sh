#!/usr/bin/env bash
# The five stages, one after the other, from a dataset to generations with retrieved chunks; see --help.
# shellcheck disable=SC2329    # the functions of the stages are called by name
set -euo pipefail

self=${BASH_SOURCE[0]}
if [[ -L $self ]]; then
    self=$(readlink -f "$self")
fi
root=$(dirname "$self")
# Paths are shown as the reader would type them: in the repository without a folder in front.
here=$root/
here=${here#./}

# γ suits the embedded example's models; θ says little about others, so eval.py chooses it.
dataset=
model_ds=
model_gen=
partition=train
tok_prob_threshold=0.1
similarity_threshold=auto
max_new_tokens=100
temperature=0.7
output_dir=
prompt_file=
input_files=()
data_flags=()     # stage 1
cache_flags=()    # stages 1, 2, 3 and 5
model_flags=()    # stages 2 and 5
window_flags=()   # stage 2
chunk_source=     # stage 3
chunk_flags=()    # stage 3
trie_flags=()     # stage 4
eval_flags=()     # stage 5
environment=()    # variables set for a stage
shown_flags=()    # all stages

usage() {
    cat <<END
usage: run_pipeline.sh [flags]

Runs the five stages: text, probabilities and hidden states, chunks, token tries, and generation with and without the
chunks. Makes .venv and installs requirements.txt first if that is still to do. Without flags it runs the embedded
example: the Python documentation, with a small language model that learned it (examples/models/large), writing on from
the openings of documents it has not seen. Run again after an interruption, it goes on where it was.

Text
  --dataset NAME             one of preprocess_dataset.py's (default: python-docs; local with --input_files)
  --input_files PATH...      your own txt, jsonl, json or parquet files, or folders of them
  --text_column NAME         column of --input_files that holds the text (default: text)
  --max_passages N           of each split, the first N passages (default: all)
  --validation_fraction F, --test_fraction F          of --input_files, kept out of train (default: stage 1's own)
  --partition NAME           split that the chunks come from (default: $partition)
Models (folders or Hugging Face hub names, with the same tokenizer)
  --model_gen PATH           generates, its hidden states index the chunks (default: --model_ds)
  --model_ds PATH            chooses the chunks (default: --model_gen; with neither: examples/models/large)
  --device NAME              torch device (default: CUDA if there is one)
  --dtype NAME               auto, float32, bfloat16 or float16 (default: auto)
  --threads N                that torch computes with (default: what is fastest on a CPU, see eval.py)
  --cache_dir DIR            for downloads from the Hugging Face hub (default: the hub's own)
Datastore
  --tok_prob_threshold γ     in [0, 1): tokens above it under --model_ds are in a chunk (default: $tok_prob_threshold)
  --chunk_source NAME        probability; expert: spans marked in the text; or both (default: probability)
  --chunk_size N, --stride N, --min_length N          windows of stage 2, in tokens (default: its own)
  --max_chunk_length N, --skip_first_tokens N         chunks of stage 3, in tokens (default: its own)
  --max_workers N            processes of stage 4 (default: its own)
Generation
  --prompt_file FILE         prompts (default: examples/prompts.json for python-docs, else cut from the test split)
  --prompt_template TEXT     put around each prompt, which {prompt} in it stands for (default: none)
  --chat                     wrap prompts in the tokenizer's chat template
  --similarity_threshold θ   in [-1, 1]: cosine similarity from which a chunk is accepted; or auto, which chooses θ and
                             δ by the validation split, or by the datastore's own text (default: $similarity_threshold)
  --max_cost NATS            what auto may lose a token of the text's likelihood under the model (default: eval.py's)
  --min_first_token_prob δ   in [0, 1]: share of the LM's likeliest token that the LM must give a chunk's first token
                             (default: 0, which does not ask the LM; needs a θ)
  --reject_repeats           accept no chunk that repeats the text (auto does so too)
  --acceptance NAME          threshold or bernoulli (default: threshold)
  --max_new_tokens N         per prompt (default: $max_new_tokens)
  --temperature T            of the model's tokens; 0 is greedy (default: $temperature)
  --top_k K, --top_p P, --seed N                      drawing of tokens (default: eval.py's)
Output
  --output_dir DIR           for everything (default: output/DATASET in the repository)
  --report FILE              also write a page about the generations, such as report.html
  --overwrite                replace generations there that were made with other settings
  --quiet                    show results and errors only: no commands, no progress bars
  --verbose                  also say what is read and how long each part takes
  --help                     this text
END
}

refuse() {
    echo "run_pipeline.sh: error: $1" >&2
    exit 2
}

parse_flags() {
    local value
    while (($#)); do
        if [[ $1 == --*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        value=${2-}
        case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --chat | --reject_repeats | --overwrite)
            eval_flags+=("$1")
            shift
            continue
            ;;
        --quiet | --verbose)
            shown_flags=("$1")
            shift
            continue
            ;;
        --dataset) dataset=$value ;;
        --partition) partition=$value ;;
        --model_gen) model_gen=$value ;;
        --model_ds) model_ds=$value ;;
        --tok_prob_threshold) tok_prob_threshold=$value ;;
        --similarity_threshold) similarity_threshold=$value ;;
        --temperature) temperature=$value ;;
        --max_new_tokens) max_new_tokens=$value ;;
        --output_dir) output_dir=$value ;;
        --prompt_file) prompt_file=$value ;;
        --text_column | --max_passages | --validation_fraction | --test_fraction) data_flags+=("$1" "$value") ;;
        --cache_dir) cache_flags=("$1" "$value") ;;
        --device | --dtype | --threads) model_flags+=("$1" "$value") ;;
        --chunk_size | --stride | --min_length) window_flags+=("$1" "$value") ;;
        --max_chunk_length | --skip_first_tokens) chunk_flags+=("$1" "$value") ;;
        --chunk_source) chunk_source=$value ;;
        --max_workers) trie_flags+=("$1" "$value") ;;
        --prompt_template | --min_first_token_prob | --max_cost | --acceptance | --top_k | --top_p | --seed | --report)
            eval_flags+=("$1" "$value")
            ;;
        --input_files) ;;
        *) refuse "unknown flag '$1' (see --help)" ;;
        esac
        if [[ -z $value || $value == --* ]]; then
            refuse "$1 needs a value (see --help)"
        fi
        if [[ $1 != --input_files ]]; then
            shift 2
            continue
        fi
        shift
        while (($#)) && [[ $1 != --* ]]; do
            input_files+=("$1")
            shift
        done
    done
}

# What was not given, from what was.
fill_in() {
    if ((${#input_files[@]})); then
        dataset=${dataset:-local}
        data_flags+=(--input_files "${input_files[@]}")
    fi
    if [[ -n $chunk_source ]]; then
        chunk_flags+=(--chunk_source "$chunk_source")
    fi
    if [[ $chunk_source == expert || $chunk_source == both ]]; then
        window_flags=(--min_length 1 "${window_flags[@]}")    # one that was given comes later and counts
    fi
    dataset=${dataset:-python-docs}
    model_gen=${model_gen:-${model_ds:-${here}examples/models/large}}
    model_gen=${model_gen%/}
    model_ds=${model_ds:-$model_gen}
    model_ds=${model_ds%/}
    output_dir=${output_dir:-${here}output/$dataset}
    output_dir=${output_dir%/}
    if [[ -z $prompt_file && $dataset == python-docs ]]; then
        prompt_file=${here}examples/prompts.json
    fi
    if [[ -n $prompt_file && ! -f $prompt_file ]]; then
        refuse "$prompt_file: is no file; give the prompts to write on from"
    fi
    label_gen=$(basename "$model_gen")
    label_ds=$(basename "$model_ds")
    if [[ $model_gen != "$model_ds" && $label_gen == "$label_ds" ]]; then
        refuse "$model_ds and $model_gen have one name, which folders are named after; rename one of them"
    fi
    local model
    for model in "$model_ds" "$model_gen"; do
        # org/name may be on the hub; anything else with a slash is a path.
        if [[ ! -d $model && ! ($model == *.gguf && -f $model) && ($model == [./~]* || $model == */*/*) ]]; then
            refuse "$model: is no folder; give the folder of a model, or its hub name"
        fi
    done
}

# The command of each stage, in the array `command`.
stage_1() {
    command=(preprocess_dataset.py --dataset "$dataset" --output_dir "$output_dir/data" "${data_flags[@]}")
    command+=("${cache_flags[@]}")
}

# stage_2 MODEL LABEL FLAGS...
stage_2() {
    command=(extract_token_probs_and_memmap.py --model_path "$1" --data_dir "$output_dir/data")
    command+=(--output_dir "$output_dir/extracted/$2" --partition "$partition" "${@:3}")
    command+=("${window_flags[@]}" "${model_flags[@]}" "${cache_flags[@]}")
}

stage_2_gen() {
    stage_2 "$model_gen" "$label_gen" --save_hidden_states --construct_memmap --discard_intermediates
}

stage_2_ds() {
    stage_2 "$model_ds" "$label_ds"
}

stage_3() {
    command=(save_token_trie_info.py --token_prob_dir "$output_dir/extracted/$label_ds/$partition")
    command+=(--output_dir "$output_dir/tries" --model_name "$model_ds" --dataset_name "$dataset")
    command+=("${labels[@]}" "${chunk_flags[@]}" "${cache_flags[@]}")
}

stage_4() {
    local extracted=$output_dir/extracted/$label_gen/$partition
    command=(make_token_trie.py --save_dir "$output_dir/tries" --dataset_name "$dataset" "${labels[@]}")
    command+=(--idx_to_seqlen_path "${extracted}_index_to_seqlen.json")
    command+=(--index_to_acc_index_path "${extracted}_index_to_acc_index.json")
    command+=(--all_hidden_states_path "$extracted.h5" "${trie_flags[@]}")
}

stage_5() {
    command=(eval.py --model_path "$model_gen" --token_trie_dir "$output_dir/tries" --dataset "$dataset")
    command+=("${labels[@]}" --prompt_file "$prompt_file" --save_dir "$save_dir")
    command+=(--similarity_threshold "$similarity_threshold" --max_new_tokens "$max_new_tokens")
    if [[ $similarity_threshold == auto ]] && grep -qs '"text"' "$output_dir/data/validation.json"; then
        command+=(--threshold_text "$output_dir/data/validation.json")
    fi
    command+=(--temperature "$temperature" --compare_baseline "${eval_flags[@]}" "${model_flags[@]}" "${cache_flags[@]}")
}

# check STAGE...: let the script judge its flags, so that a wrong one for the last stage does not cost the first four.
check() {
    "$@"
    # --help ends a script that found every flag before it right.
    "$python" "$here${command[0]}" "${command[@]:1}" --help >/dev/null
}

# run STAGE...: show its command and run it.
run() {
    "$@"
    command+=("${shown_flags[@]}")
    if [[ ${shown_flags[*]} != --quiet ]]; then
        printf '\n+'
        printf ' %q' "${environment[@]}" python "$here${command[0]}" "${command[@]:1}"
        printf '\n'
    fi
    env "${environment[@]}" "$python" "$here${command[0]}" "${command[@]:1}"
}

main() {
    parse_flags "$@"
    fill_in
    labels=(--model_ds "$label_ds" --model_gen "$label_gen")
    labels+=(--partition "$partition" --tok_prob_threshold "$tok_prob_threshold")
    save_dir=$output_dir/results/DS${label_ds}_H${label_gen}_${partition}_$tok_prob_threshold
    prompts_to_cut=$output_dir/prompts.json
    # shellcheck source=utils/venv.sh
    source "${here}utils/venv.sh"
    ensure_venv "$root" requirements.txt
    python=${here}.venv/bin/python

    local stages=(stage_1 stage_2_gen) stage
    if [[ $model_ds != "$model_gen" ]]; then
        stages+=(stage_2_ds)
    fi
    stages+=(stage_3 stage_4)
    prompt_file=${prompt_file:-$prompts_to_cut}
    for stage in "${stages[@]}" stage_5; do
        check "$stage"
    done
    for stage in "${stages[@]}"; do
        run "$stage"
    done
    if [[ $prompt_file == "$prompts_to_cut" && ! -f $prompt_file ]]; then
        "$python" "${here}examples/make_prompts.py" --data_file "$output_dir/data/test.json" --output_file "$prompt_file"
    fi
    # The forward pass of the example's model is too small to share: a second thread gains nothing, and on a machine with
    # other work each step waits for it (33 ms a token instead of 4, measured beside a busy process on 2 cores).
    if [[ $model_gen == "${here}examples/models/"* && -z ${OMP_NUM_THREADS-} ]]; then
        environment=(OMP_NUM_THREADS=1)
    fi
    run stage_5
    cat <<END

Passages                         $output_dir/data
Probabilities and hidden states  $output_dir/extracted
Datastore                        $output_dir/tries
Generations and summary          $save_dir
END
}

main "$@"; exit    # on one line: bash has read it whole, should the file change during the run
