#!/bin/bash
# Runs unchanged clients of vLLM on nanovllm, each in an environment of its own.
#
#   tests/clients/run.sh [FOLDER] [CLIENT...]     # no client: all
#
# Clients: lm-eval, lighteval, trl, outlines, ray.
# FOLDER (by default build/clients) keeps the environments. PYTHON names the interpreter.
# SHARED names a site-packages folder that has torch, transformers and pytest already.
# It is searched after the environment's own, and saves gigabytes. Without it TORCH has pip's
# arguments for torch; by default these take the CPU's wheel. Needs PyPI.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
folder=${1:-$root/build/clients}
shift || true
clients=${*:-lm-eval lighteval trl outlines ray}

requirements() { # the versions that docs/compatibility.md names
  case $1 in
    lm-eval) echo "lm-eval==0.4.13 accelerate" ;;
    # Its log of answers fails with xxhash 4. It imports ray and more_itertools without asking for them.
    lighteval) echo "lighteval==0.13.0 ray==2.60.0 more_itertools xxhash<4" ;;
    trl) echo "trl==1.16.0 peft" ;;
    outlines) echo "outlines==1.3.3" ;;
    ray) echo "ray[data]==2.60.0" ;;
    *) echo "unknown client $1; known are lm-eval, lighteval, trl, outlines and ray" >&2; exit 2 ;;
  esac
}

prepare() { # makes the environment once
  local client=$1 env=$folder/$1
  [ -e "$env/ready" ] && return
  "${PYTHON:-python3}" -m venv "$env"
  local site
  site=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  if [ -n "${SHARED:-}" ]; then
    echo "$SHARED" > "$site/shared.pth"
  else
    # shellcheck disable=SC2086  # the words are arguments
    "$env/bin/pip" install -q ${TORCH:-torch --index-url https://download.pytorch.org/whl/cpu}
    "$env/bin/pip" install -q -e "$root[test]"
  fi
  # A client must not bring another torch or transformers.
  "$env/bin/python" -c '
from importlib.metadata import version
for name in ("torch", "transformers"):
    print(f"{name}=={version(name)}")
' > "$env/constraints.txt"
  # shellcheck disable=SC2046  # the words are requirements
  "$env/bin/pip" install -q -c "$env/constraints.txt" $(requirements "$client")
  touch "$env/ready"
}

failed=""
for client in $clients; do
  requirements "$client" > /dev/null
  prepare "$client"
  echo "== $client: $(requirements "$client")"
  # vllm comes from alias/, nanovllm from this repository.
  if ! PYTHONPATH=$root/alias:$root:$root/tests HF_HUB_OFFLINE=1 HF_HOME=$folder/$client/hf \
    TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 \
    "$folder/$client/bin/python" "$here/${client//-/_}_client.py"; then
    failed="$failed $client"
  fi
done
if [ -n "$failed" ]; then
  echo "failed:$failed" >&2
  exit 1
fi
