#!/usr/bin/env bash
# Everything that is measured on a GPU, on a machine with torch and little else, without a network:
#
#     bash benchmarks/gpu.sh [python]
#
# Needs Python 3.11, torch, NumPy, SciPy, pydantic and pytest; nothing of the service's. Inference is
# measured where MONAI, onnx, nibabel and an onnxruntime with CUDA are there too, and skipped with a
# line where they are not. In the end it prints one table, and leaves the JSON of each part in $OUT (a new folder if unset). Takes under
# eight minutes. PCRL_GPU_SMOKE=1 runs every part at tiny sizes on whatever device there is, which is
# how this script is tested where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
out=${OUT:-$(mktemp -d)}
smoke=${PCRL_GPU_SMOKE:-0}
mkdir -p "$out"
export PYTHONPATH=. PYTHONDONTWRITEBYTECODE=1

"$python" - <<'PYTHON' || exit 2
import importlib.util
import sys

need = ("torch", "numpy", "scipy", "pydantic", "pytest")
absent = [name for name in need if importlib.util.find_spec(name) is None]
if absent:
    sys.exit(f"not installed: {', '.join(absent)}. The trainer's core and its benchmarks need "
             f"{', '.join(need)} (pydantic: recipes; SciPy: the implementation compared with)")
if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]} found, 3.11 or newer needed")
PYTHON

if [ "$smoke" != 1 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
then
    echo "torch sees no CUDA device; PCRL_GPU_SMOKE=1 tries the script without one" >&2
    exit 2
fi
"$python" -c '
import torch
from benchmarks import common
print(common.environment(common.training_device()))
'

# part NAME SECONDS COMMAND...: its standard output goes to $out/NAME.txt, and so does its failure.
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    echo "== $name" >&2
    timeout "$limit" "$@" >"$out/$name.txt"
    echo "$? $((SECONDS - began))" >"$out/$name.status"
}

# can_infer PROVIDER: whether the inference benchmark finds what it needs.
can_infer() {
    "$python" - "$1" <<'PYTHON'
import importlib.util
import sys

need = ("monai", "onnx", "nibabel", "safetensors", "onnxruntime")
absent = [name for name in need if importlib.util.find_spec(name) is None]
if not absent:
    import onnxruntime

    if sys.argv[1] not in onnxruntime.get_available_providers():
        absent = [f"an onnxruntime with {sys.argv[1]}"]
if absent:
    sys.exit(f"== inference: skipped, not installed: {', '.join(absent)}")
PYTHON
}

# No conftest and no settings of the project: they want the service's packages and pytest's plugins.
part tests "$((smoke == 1 ? 300 : 90))" "$python" -m pytest -q -p no:cacheprovider --noconftest -c /dev/null --rootdir=. \
    --import-mode=importlib -W ignore::pytest.PytestUnknownMarkWarning tests/trainer/test_on_gpu.py
if [ "$smoke" = 1 ]; then
    part step 1200 "$python" -m benchmarks.bench_step --json --smoke --limit-s "${LIMIT_S:-60}"
    part input 600 "$python" -m benchmarks.bench_input --json --smoke \
        --pairs 2 --rounds 2 --steps 1 --width 2 --batch 2
    if can_infer CPUExecutionProvider; then
        part inference 300 "$python" -m benchmarks.bench_inference --json --smoke --rounds 1
    fi
else
    part step 260 "$python" -m benchmarks.bench_step --json --limit-s "${LIMIT_S:-90}"
    part input 120 "$python" -m benchmarks.bench_input --json --rounds 3
    if can_infer CUDAExecutionProvider; then
        part inference 240 "$python" -m benchmarks.bench_inference --json --device cuda \
            --only one_pass --width 32 --steps 300 --fine-steps 100 --rounds 3
    fi
fi

"$python" - "$out" <<'PYTHON'
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
failed = []
print(f"\n{'what':<44} value")
for name in ("tests", "step", "input", "inference"):
    if not (out / f"{name}.status").exists():
        continue
    lines = (out / f"{name}.txt").read_text().splitlines() or ["(nothing)"]
    status, seconds = (out / f"{name}.status").read_text().split()
    if status != "0":
        failed.append(name)
    print(f"{name + ': exit status':<44} {status}, {seconds} s")
    if not lines[-1].startswith("{"):
        print(f"{name:<44} {lines[-1]}")
        continue
    found = json.loads(lines[-1])
    for key, value in found.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in inner:
            shown = f"{number:.4g}" if isinstance(number, float) else number
            print(f"{f'{name} {key} {part}':<44} {shown}")
print(f"\nJSON of each part: {out}")
sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
PYTHON
