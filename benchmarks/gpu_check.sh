#!/usr/bin/env bash
# Check and time everything that needs a CUDA device, in under 8 minutes:
#
#     bash benchmarks/gpu_check.sh
#
# 1. The tests of captured graphs and of compiled code on CUDA: eager results, nothing learned in building, restoring, resuming.
# 2. Runs of DDPG and TD3 killed at random moments on the device, resumed and compared bit for bit.
# 3. Steps a second of captured graphs, compiled code, eager code and stable-baselines3, alternating; then the same of TD3.
# 4. Microseconds by part of the loop; where the replay buffer should live; TF32.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -c "import torch; print(torch.__version__, torch.version.cuda); assert torch.cuda.is_available()"
timeout 200 python -m pytest -q -n0 -m "" tests/test_accelerate.py -k "cuda or captur"
timeout 100 python benchmarks/kill_test.py --cuda --trials 6 --jobs 6
timeout 80 python benchmarks/kill_test.py --cuda --script td3_continuous_action --trials 4 --jobs 4
timeout 200 python benchmarks/speed.py --cuda --sides cudagraph compile eager stable-baselines3 --rounds 10
timeout 80 python benchmarks/speed.py --cuda --script td3_continuous_action --sides cudagraph stable-baselines3 --rounds 5
timeout 40 python benchmarks/speed.py --cuda --sides cudagraph --profile
timeout 30 python benchmarks/sampling.py --cuda
timeout 90 python benchmarks/speed.py --cuda --sides "cudagraph --matmul-precision high" cudagraph --rounds 5
