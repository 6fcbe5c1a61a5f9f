# Stand in for CANN's set_env.sh: put atc and npu-smi on PATH; like the real one it breaks under `set -u`.
export LD_LIBRARY_PATH=/usr/local/Ascend/ascend-toolkit/latest/lib64:$LD_LIBRARY_PATH
PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../bin" && pwd):$PATH
export PATH
