#!/usr/bin/env bash
# Installs the CUDA compiler 13.0 from PyPI into a folder of its own, for those without a toolkit. Nothing else on the
# machine changes; deleting the folder undoes it.
#
#   kernels/cuda/install-nvcc.sh [FOLDER]          # target/nvcc by default; prints what to set
#
# Needs python3 with pip.
set -euo pipefail

folder=${1:-$(dirname "$0")/../../target/nvcc}
release='13.0.*'
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
root=$folder/nvidia/cu13

if [ ! -x "$root/bin/nvcc" ]; then
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --target "$folder" \
        "nvidia-cuda-nvcc==$release" "nvidia-nvvm==$release" "nvidia-cuda-crt==$release" \
        "nvidia-cuda-runtime==$release" "nvidia-cuda-cccl==$release" >&2
fi
# nvcc looks for libraries in lib64; the wheels put them in lib.
[ -e "$root/lib64" ] || ln -s lib "$root/lib64"
"$root/bin/nvcc" --version >&2
echo "export SINF_NVCC=$root/bin/nvcc"
