#!/usr/bin/env bash
# Unpack a CUDA 11.8 compiler, which still targets the V100 (sm_70), and print the path of its nvcc.
#
#   usage: tools/volta-toolkit.sh [DEST]      default: ~/.cache/flexattn/cuda-11.8
#   then:  make sm70 NVCC="$(tools/volta-toolkit.sh)" HOST_CXX=g++-11
#
# Needs Debian 12 (its non-free component packages CUDA 11.8), root and about 110 MB of downloads; a second call returns at
# once. Only g++-11 is installed system-wide. Any CUDA toolkit up to 12.9 serves as well, but the budgets in
# csrc/kernels/budgets.json were set with this one.
#
# Contents: nvcc, cicc, ptxas, cuobjdump and nvdisasm from Debian; runtime, nvcc and CCCL headers from Python wheels. It
# compiles and links. It brings no driver, so nothing built with it runs without one.
set -euo pipefail

dest=${1:-$HOME/.cache/flexattn/cuda-11.8}
if [[ -x $dest/bin/nvcc ]]; then
  echo "$dest/bin/nvcc"
  exit 0
fi

sources=/etc/apt/sources.list.d/debian.sources
if ! grep -qs 'VERSION_CODENAME=bookworm' /etc/os-release || [[ ! -f $sources ]]; then
  echo "volta-toolkit.sh: only Debian 12 packages CUDA 11.8; run it in a debian:bookworm container, or pass NVCC of a toolkit up to 12.9" >&2
  exit 1
fi

exec 3>&1 1>&2 # only the path goes to stdout
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/debs/partial" "$work/wheels"
chmod -R a+rx "$work"

# The machine's own Debian source with the non-free component, in lists of its own.
sed 's/^Components:.*/Components: main contrib non-free/' "$sources" >"$work/all.sources"
apt_get() {
  apt-get -q -o Dir::Etc::sourcelist="$work/all.sources" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=root \
    -o Dir::State::lists="$work/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}
apt_get update
command -v g++-11 >/dev/null || apt_get install -y --no-install-recommends g++-11
(cd "$work/debs" && apt_get download nvidia-cuda-toolkit)
dpkg -x "$work"/debs/nvidia-cuda-toolkit_*.deb "$work/root"
python3 -m pip download -q --no-deps -d "$work/wheels" \
  nvidia-cuda-runtime-cu11==11.8.89 nvidia-cuda-nvcc-cu11==11.8.89 nvidia-cuda-cccl-cu11==11.8.89.post1
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done

tree=$work/tree
root=$work/root/usr
mkdir -p "$tree"/{bin,include,lib64,nvvm/bin,nvvm/libdevice}
cp "$root"/bin/{bin2c,cudafe++,cuobjdump,fatbinary,nvdisasm,nvlink,nvprune,ptxas,cu++filt,__nvcc_device_query} "$tree/bin/"
cp -r "$root"/lib/nvidia-cuda-toolkit/bin/{crt,nvcc} "$tree/bin/"
cp "$root/lib/nvidia-cuda-toolkit/bin/cicc" "$tree/nvvm/bin/"
cp "$root/lib/nvidia-cuda-toolkit/libdevice/libdevice.10.bc" "$tree/nvvm/libdevice/"
for part in cuda_nvcc cuda_runtime cuda_cccl; do cp -r "$work/site/nvidia/$part/include/." "$tree/include/"; done
cp "$work/site/nvidia/cuda_runtime/lib/libcudart.so.11.0" "$tree/lib64/"
ln -sf libcudart.so.11.0 "$tree/lib64/libcudart.so"

# nvcc always asks the linker for the device runtime. No kernel here uses it, so an empty archive will do.
echo 'static int unused;' | gcc -x c -c -o "$work/empty.o" -
ar rcs "$tree/lib64/libcudadevrt.a" "$work/empty.o"

cat >"$tree/bin/nvcc.profile" <<'PROFILE'
TOP              = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
LD_LIBRARY_PATH += $(TOP)/lib64:
PATH            += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES        +=  "-I$(TOP)/include" $(_SPACE_)
LIBRARIES        =+ $(_SPACE_) "-L$(TOP)/lib64"
CUDAFE_FLAGS    +=
PTXAS_FLAGS     +=
PROFILE
chmod +x "$tree"/bin/* "$tree"/nvvm/bin/*
mkdir -p "$(dirname "$dest")"
rm -rf "$dest"
mv "$tree" "$dest"
echo "$dest/bin/nvcc" >&3
