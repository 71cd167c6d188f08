#!/usr/bin/env bash
# Check and time everything that needs a CUDA device, in under 8 minutes:
#
#     bash benchmarks/gpu_check.sh
#
# 1. The tests of captured graphs and of compiled code on CUDA: eager results, nothing learned in building, restoring, resuming.
# 2. Runs killed at random moments on the device, resumed and compared bit for bit.
# 3. Steps a second of captured graphs, compiled code, eager code and stable-baselines3, alternating.
# 4. Microseconds by part of the loop; where the replay buffer should live; TF32.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -c "import torch; print(torch.__version__, torch.version.cuda); assert torch.cuda.is_available()"
timeout 200 python -m pytest -q -n0 -m "" tests/test_accelerate.py -k "cuda or captur"
timeout 120 python benchmarks/kill_test.py --cuda --trials 8 --jobs 8
timeout 240 python benchmarks/speed.py --cuda --sides cudagraph compile eager stable-baselines3 --rounds 15
timeout 40 python benchmarks/speed.py --cuda --sides cudagraph --profile
timeout 30 python benchmarks/sampling.py --cuda
timeout 90 python benchmarks/speed.py --cuda --sides "cudagraph --matmul-precision high" cudagraph --rounds 10
