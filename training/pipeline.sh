#!/usr/bin/env bash
# The whole way, from pictures to a mixed answer, with the very programs of the stages.
#
#   bash training/pipeline.sh                 drawn phantoms of a modality that tiny does not know
#   bash training/pipeline.sh VQA_RAD_FOLDER  VQA-RAD: its pictures, questions and answers
#
# Everything it makes lies in build/demo (or build/vqa_rad); index.html there shows it all.
set -euo pipefail
data="${1:+$(cd "$1" && pwd)}"
cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
if ! python -c 'import medley' 2>/dev/null; then
  echo "training/pipeline.sh: medley is not installed for $(command -v python); run make demo first" >&2
  exit 2
fi

out="build/${data:+vqa_rad}"
[ -n "$data" ] || out=build/demo
rm -rf "$out"
mkdir -p "$out"

# Runs a command, shows it, and keeps it for the page at the end.
run() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  printf '%s\n' "$*" >>"$out/commands.txt"
  "$@"
}

# --- data: documents, and a list of their pictures ----------------------------------------
if [ -n "$data" ]; then
  # By way of LLaVA's form, which its tools read, too; no picture is in both halves.
  run python -m conversion.convert_dataset --from vqa_rad --to llava --input "$data" \
    --test_share 0.15 --output "$out/llava"
  for part in train test; do
    run python -m conversion.convert_dataset --from llava --input "$out/llava/$part.json" \
      --image_folder "$data/images" --output "$out/data/$part.jsonl"
  done
  cp "$out/llava/pictures.csv" "$out/data/"
  steps=150
else
  # Three scans in ten are of what tiny knows, so that it does not forget that.
  run python -m conversion.draw_phantoms --output "$out/data" --modality MR-CT --known_share 0.3 \
    --train 2000 --test 60
  steps=800
fi

# --- stage 1: pictures -> codes (two ranks), documents -> token sequences ------------------
run torchrun --nproc-per-node=2 -m tokenizer.image_tokenization \
  --input "$out/data/pictures.csv" --output "$out/codes" --ckpt tiny --partition_size 200
tiny=$(python -c 'from medley.checkpoints import tiny_folder; print(tiny_folder())')
for part in train test; do
  run python -m tokenizer.tokenize_jsonl --input_file "$out/data/$part.jsonl" --image_codes "$out/codes" \
    --tokenizer_file "$tiny/tokenizer/text_tokenizer.json" --output_file "$out/$part.tokens.jsonl"
done

# --- stage 2: Chameleon's layout -> Hugging Face's, LoRA under DeepSpeed (two ranks) -------
run python -m conversion.pth_to_bin --input_dir tiny --output_dir "$out/base-hf" --verify
run torchrun --nproc-per-node=2 -m training.train --config training/recipes/demo.yaml \
  --ckpt "$out/base-hf" --train_data "$out/train.tokens.jsonl" --val_data "$out/test.tokens.jsonl" \
  --output_dir "$out/lora" --steps "$steps"

# --- stage 3: merge, and back to Chameleon's layout ----------------------------------------
run python -m conversion.merge_lora --ckpt_path "$out/lora" --base_path "$out/base-hf" \
  --output_dir "$out/merged-hf" --verify
run python -m conversion.bin_to_pth --trained_ckpt "$out/merged-hf" --original_ckpt tiny \
  --new_ckpt "$out/final" --verify

# --- use it: the converted .pth checkpoint reads and draws ---------------------------------
run python -m training.pipeline_report prompts --data "$out/data" --output "$out"
for mode in image text any; do
  run medley generate --ckpt "$out/final" --input "$out/prompts-$mode.jsonl" --mode "$mode" \
    --repetition_penalty 1.0 --text_greedy --image_temperature 0.4 --guidance_scale_text 1.5 \
    --max_images 1 --max_new_tokens 160 --output "$out/answers-$mode"
done

if [ -n "$data" ]; then  # an answer file as LLaVA's evaluations read it
  run medley answer --ckpt "$out/final" --questions "$out/llava/test.json" \
    --image_folder "$data/images" --text_greedy --repetition_penalty 1.0 --max_new_tokens 40 \
    --output "$out/answers.jsonl"
fi

# --- what it learned, before and after, on one page ----------------------------------------
run python -m training.pipeline_report page --data "$out/data" --output "$out" --before tiny --after "$out/final"
echo
echo "See $out/index.html"
