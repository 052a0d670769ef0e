#!/bin/bash
# Tests the Triton kernels under several versions of Triton, without a GPU.
#
#     tests/gpu/triton_versions.sh DIR [VERSION...]
#
# Installs each version into DIR, beside the packages of the Python that runs, and runs the
# tests that interpret kernels and the tests of the launch path. Ends with one line a version.
set -u
folder=$(realpath -m "${1:?usage: tests/gpu/triton_versions.sh DIR [VERSION...]}")
shift
versions=("${@:-}")
[ -n "${versions[0]}" ] || versions=(3.4.0 3.6.0 3.7.1)
cd "$(dirname "$0")/../.." || exit
interpreted="tests/test_triton_kernels.py tests/test_triton_products.py tests/test_interpreted_engine.py"
summary=""
failed=0
for version in "${versions[@]}"; do
    packages=("triton==$version")
    # Interpreters before 3.7 convert arrays of one element to numbers, as numpy 2.4 does not.
    case $version in 3.[0-6].*) packages+=("numpy<2.4") ;; esac
    target=$folder/$version
    if [ ! -d "$target/triton" ]; then
        pip install -q --no-deps --target "$target" "${packages[@]}" || exit
    fi
    export PYTHONPATH=$target
    found=$(python -c "import numpy, triton; print(triton.__version__, 'numpy', numpy.__version__)")
    result="passed"
    # shellcheck disable=SC2086
    TRITON_INTERPRET=1 python -m pytest -q -p no:cacheprovider -p no:xdist $interpreted ||
        result="FAILED"
    python -m pytest -q -p no:cacheprovider -p no:xdist tests/test_gpu_path.py || result="FAILED"
    [ $result = passed ] || failed=1
    summary+="triton $found: $result"$'\n'
done
printf '%s' "$summary"
exit $failed
