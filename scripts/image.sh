#!/usr/bin/env bash
# Builds the image, then starts it the way a pod would. Needs Docker with BuildKit; DOCKER names another client.
#
#   bash scripts/image.sh [--tag TAG] [--cuda] [--compiler] [--base IMAGE] [--extras EXTRAS]
#                         [--torch-index URL] [--wheels FOLDER] [--ca FILE] [--network NETWORK]
#
#   --tag TAG          name of the image (registry.example.com/auto-painter:VERSION)
#   --cuda             torch for NVIDIA GPUs, from PyPI, instead of the smaller one for CPUs
#   --compiler         with g++, for train.compile=true: 410 MB more; the base must be a Debian with Python's headers
#   --base IMAGE       what it is built on: bash and Python 3.11 or later with its venv module
#   --extras EXTRAS    of pyproject.toml; 'ray' leaves out the sample drawings and the S3 server
#   --torch-index URL  where torch comes from
#   --wheels FOLDER    wheels that pip prefers to those of the index (PIP_FIND_LINKS, if that is a folder)
#   --ca FILE          certificates that pip trusts during the build (PIP_CERT)
#   --network NETWORK  of Docker, for the build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
docker="${DOCKER:-docker}"

fail() {
    echo "image.sh: $*" >&2
    exit 2
}

version="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"
tag="registry.example.com/auto-painter:$version" base='' extras='' index='' cuda='' compiler='' network=''
ca="${PIP_CERT:-}" wheels=''
if [ -d "${PIP_FIND_LINKS:-}" ]; then wheels="$PIP_FIND_LINKS"; fi
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --cuda) cuda=1; shift; continue ;;
        --compiler) compiler=g++; shift; continue ;;
        --tag | --base | --extras | --torch-index | --wheels | --ca | --network) [ $# -gt 1 ] || fail "$1 needs a value" ;;
        *) fail "unknown option $1; see --help" ;;
    esac
    case "$1" in
        --tag) tag="$2" ;;
        --base) base="$2" ;;
        --extras) extras="$2" ;;
        --torch-index) index="$2" ;;
        --wheels) wheels="$2" ;;
        --ca) ca="$2" ;;
        --network) network="$2" ;;
    esac
    shift 2
done
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then fail "--wheels: $wheels is no folder"; fi
if [ -n "$ca" ] && [ ! -s "$ca" ]; then fail "--ca: $ca is no file"; fi
"$docker" version > /dev/null || fail "the Docker engine does not answer"

if [ -n "$cuda" ]; then
    wheels='' index="${index:-https://pypi.org/simple}"
elif [ -n "$wheels" ] && compgen -G "$wheels/torch-*+cpu*.whl" > /dev/null; then
    index="${index:-https://pypi.org/simple}"  # pip still asks an index, and takes the wheel
fi
arguments=(--tag "$tag" --build-arg "REVISION=$(git describe --always --dirty --exclude '*' 2> /dev/null || echo unknown)")
if [ -n "$base" ]; then arguments+=(--build-arg "BASE_IMAGE=$base"); fi
if [ -n "$compiler" ]; then arguments+=(--build-arg "COMPILER=$compiler"); fi
if [ -n "$extras" ]; then arguments+=(--build-arg "EXTRAS=$extras"); fi
if [ -n "$index" ]; then arguments+=(--build-arg "TORCH_INDEX_URL=$index"); fi
if [ -n "$network" ]; then arguments+=(--network "$network"); fi
if [ -n "$ca" ]; then arguments+=(--secret "id=ca,src=$ca"); fi
if [ -n "$wheels" ]; then
    tar -C "$wheels" -c . | "$docker" import - auto-painter-wheels > /dev/null
    trap '"$docker" image rm auto-painter-wheels > /dev/null' EXIT
    arguments+=(--build-arg WHEELS_IMAGE=auto-painter-wheels)
fi
DOCKER_BUILDKIT=1 "$docker" build "${arguments[@]}" .

echo "Starting $tag without network and rights, on a read-only root file system:" >&2
"$docker" run --rm --read-only --user 1000 --cap-drop ALL --security-opt no-new-privileges --network none \
    --tmpfs /tmp "$tag" autopainter doctor
"$docker" image inspect --format '{{index .RepoTags 0}}: {{.Size}} bytes' "$tag"
