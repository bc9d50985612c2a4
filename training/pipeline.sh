#!/usr/bin/env bash
# The end-to-end pipeline, from images to interleaved responses, with the commands of each stage.
#
#   bash training/pipeline.sh                 phantoms of a modality that tiny was not trained on
#   bash training/pipeline.sh VQA_RAD_FOLDER  VQA-RAD's images, questions and answers
#
# All files go to build/demo (or build/vqa_rad); the report is index.html in that folder.
set -euo pipefail
data="${1:+$(cd "$1" && pwd)}"
cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
if ! python -c 'import medley' 2>/dev/null; then
  echo "training/pipeline.sh: medley is not installed for $(command -v python). Run make demo." >&2
  exit 2
fi

out="build/${data:+vqa_rad}"
[ -n "$data" ] || out=build/demo
rm -rf "$out"
mkdir -p "$out"

# Prints a command, records it for the report, and runs it.
run() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  printf '%s\n' "$*" >>"$out/commands.txt"
  "$@"
}

# --- Data: documents and a list of their images ------------------------------------------------
if [ -n "$data" ]; then
  # Converts by way of LLaVA's format, which LLaVA's tools read. No image is in both splits.
  run medley convert --from vqa_rad --to llava --input "$data" --test_fraction 0.15 \
    --output "$out/llava"
  for split in train test; do
    run medley convert --from llava --input "$out/llava/$split.json" \
      --image_folder "$data/images" --output "$out/data/$split.jsonl"
  done
  cp "$out/llava/images.csv" "$out/data/"
  steps=150
else
  # 30% of the scans are of modalities that tiny knows, which limits forgetting.
  run medley draw-phantoms --output "$out/data" --modality MR-CT --known_fraction 0.3 \
    --train 2000 --test 60
  steps=800
fi

# --- Tokenization: images -> image codes (two ranks), documents -> token sequences -------------
run torchrun --nproc-per-node=2 -m medley tokenize-images \
  --input "$out/data/images.csv" --output "$out/codes" --ckpt tiny --partition_size 200
tiny=$(python -c 'from medley.tiny.embedded import tiny_folder; print(tiny_folder())')
for split in train test; do
  run medley tokenize --input_file "$out/data/$split.jsonl" --image_codes "$out/codes" \
    --tokenizer_file "$tiny/tokenizer/text_tokenizer.json" --output_file "$out/$split.tokens.jsonl"
done

# --- Training: conversion to Hugging Face's layout, LoRA with DeepSpeed (two ranks) ------------
run medley to-hf --input_dir tiny --output_dir "$out/base-hf" --verify
run torchrun --nproc-per-node=2 -m medley train --config demo --ckpt "$out/base-hf" \
  --train_data "$out/train.tokens.jsonl" --val_data "$out/test.tokens.jsonl" \
  --output_dir "$out/lora" --steps "$steps"

# --- Conversion: merge the adapter, convert to Chameleon's layout ------------------------------
run medley merge --ckpt_path "$out/lora" --base_path "$out/base-hf" \
  --output_dir "$out/merged-hf" --verify
run medley to-pth --trained_ckpt "$out/merged-hf" --original_ckpt tiny \
  --new_ckpt "$out/final" --verify

# --- Inference: the .pth checkpoint generates images, text and interleaved reports -------------
run python -m training.pipeline_report prompts --data "$out/data" --output "$out"
for mode in image text any; do
  run medley generate --ckpt "$out/final" --input "$out/prompts-$mode.jsonl" --mode "$mode" \
    --repetition_penalty 1.0 --text_greedy --image_temperature 0.4 --guidance_scale_text 1.5 \
    --max_images 1 --max_new_tokens 160 --output "$out/answers-$mode"
done

if [ -n "$data" ]; then  # an answer file for LLaVA's evaluation scripts
  run medley answer --ckpt "$out/final" --questions "$out/llava/test.json" \
    --image_folder "$data/images" --text_greedy --repetition_penalty 1.0 --max_new_tokens 40 \
    --output "$out/answers.jsonl"
fi

# --- Report: scores before and after training, generated responses, losses ---------------------
run python -m training.pipeline_report report --data "$out/data" --output "$out" \
  --before tiny --after "$out/final"
echo
echo "The report is $out/index.html"
