#!/usr/bin/env bash
# What only a GPU can show, in under 25 minutes and one report: correctness, speed and memory of a step, ten minutes of
# training with its pictures, running out of GPU memory, the stall of a checkpoint.
#
#   bash scripts/gpu_session.sh [--folder FOLDER]
#
#   --folder FOLDER  where everything is left (gpu-session): report.md, logs, the run
#
# PYTHON names an interpreter that has the project and pytest (.venv/bin/python). Without a GPU it says what it would
# do and ends with exit code 3; it ends with 1 if any part failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}" folder=gpu-session
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --folder) [ $# -gt 1 ] || { echo "gpu_session.sh: --folder needs a value" >&2; exit 2; }; folder="$2"; shift 2 ;;
        *) echo "gpu_session.sh: unknown option $1; see --help" >&2; exit 2 ;;
    esac
done

autopainter() { "$python" -c 'from autopainter.cli import main; main()' "$@"; }

correctness() { "$python" -m pytest -q -rs tests/test_gpu.py; }
step() { "$python" scripts/bench_step.py --device cuda --size 512 --microbatch 32 --rounds 5 --steps 5; }
memory() {
    "$python" scripts/memory_table.py --device cuda
    for images in 4 64; do # 32 is in the step's table
        "$python" scripts/bench_step.py --device cuda --size 512 --microbatch "$images" --rounds 3 --variants bfloat16 outer all
    done
}
training() {
    # Pictures made here, 512 px; the random feature network has the time of the real one.
    "$python" - "$folder" <<'PYTHON'
import sys
sys.path.insert(0, "scripts")
from pathlib import Path
from bench_step import random_features
from cartoons import pack_cartoons
folder = Path(sys.argv[1])
manifest = pack_cartoons(str(folder / "data"), pictures=2000, size=512)
fields = {"data.manifest": manifest, "run.storage": folder / "runs", **random_features(folder, "relu2_2")}
(folder / "settings").write_text("".join(f"--set\n{name}={value}\n" for name, value in fields.items()))
PYTHON
    mapfile -t settings < "$folder/settings"
    local code=0
    timeout --signal=INT 600 "$python" -c 'from autopainter.cli import main; main()' train \
        --config job/configs/minions.yaml "${settings[@]}" --set run.name=gpu --set data.image_size=512 \
        --set train.steps=1000000 --set train.global_batch=32 --set data.decode_threads=8 \
        --set checkpoint.every_seconds=60 --set telemetry.image_every_steps=500 \
        --set telemetry.metrics_folder="$folder/metrics" || code=$?
    [ "$code" = 124 ] || return 1 # it was interrupted, saved and ended
    autopainter metrics --folder "$folder/metrics" --port 9411 --host 127.0.0.1 &
    local server=$!
    curl --silent --retry 20 --retry-delay 1 --retry-connrefused http://127.0.0.1:9411/metrics |
        grep -E '^autopainter_(step|images|data_wait|checkpoint|gpu)' || code=1
    kill "$server"
    autopainter checkpoints list "$folder/runs/gpu"
    [ "$code" = 124 ]
}
out_of_memory() { "$python" -m pytest -q -rs tests/test_memory.py tests/test_metrics.py -k "gpu"; }

parts=(correctness step memory training out_of_memory)
seconds=(180 300 240 720 60) # 25 minutes at most
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_session.sh: torch finds no GPU here; with one, this would run:" >&2
    for part in "${!parts[@]}"; do
        echo "  ${parts[$part]}, at most ${seconds[$part]} s" >&2
    done
    exit 3
fi

mkdir -p "$folder"
report="$folder/report.md" failed=0
"$python" -c 'import torch; print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")' > "$report"
export folder python
export -f autopainter "${parts[@]}"
for part in "${!parts[@]}"; do
    name="${parts[$part]}"
    echo "$name ..." >&2
    code=0 began=$SECONDS
    timeout --signal=TERM "${seconds[$part]}" bash -c "set -euo pipefail; $name" > "$folder/$name.log" 2> "$folder/$name.err" || code=$?
    [ "$code" = 0 ] || failed=1
    {
        printf '\n## %s\n\nexit code %s, %s s\n\n' "${name//_/ }" "$code" "$((SECONDS - began))"
        cat "$folder/$name.log"
        if [ "$code" != 0 ]; then sed 's/^/    /' "$folder/$name.err" | tail -n 20; fi
    } >> "$report"
done
cat "$report"
exit "$failed"
