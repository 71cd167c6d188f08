#!/usr/bin/env bash
# Check and time everything that needs a CUDA device, in under 8 minutes:
#
#     bash benchmarks/gpu_check.sh
#
# 1. The tests of the captured graphs: the eager bits, nothing learned in capturing, restoring, resuming.
# 2. Steps a second of captured graphs and of eager mode, alternating (goal: 2,500 on an H200, and five times eager mode).
# 3. Microseconds by part of the loop; where the replay buffer should live; TF32.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -c "import torch; print(torch.__version__, torch.version.cuda); assert torch.cuda.is_available()"
timeout 140 python -m pytest -q -n0 tests/test_accelerate.py -k "cuda or captur"
timeout 200 python benchmarks/speed.py --cuda --sides cudagraph eager --rounds 20
timeout 40 python benchmarks/speed.py --cuda --sides cudagraph --profile
timeout 30 python benchmarks/sampling.py --cuda
timeout 60 python benchmarks/speed.py --cuda --sides cudagraph --rounds 5 --matmul-precision high
