#!/bin/sh
# Makes a machine ready to run this project: uv, the locked environment, and the rendering libraries no wheel carries.
# Idempotent, and quick where everything is there. Arguments are handed to `uv sync`, e.g. `--no-dev`.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then sudo -n env DEBIAN_FRONTEND=noninteractive "$@"
    else return 1
    fi
}

apt_ready=
apt_install() {
    command -v apt-get >/dev/null 2>&1 || return 1
    as_root true || return 1
    if [ -z "$apt_ready" ]; then
        for attempt in 1 2 3; do
            as_root apt-get -q update >&2 && break
            [ "$attempt" = 3 ] || sleep $((attempt * 5))
        done
        apt_ready=yes
    fi
    say "installing $*"
    DEBIAN_FRONTEND=noninteractive as_root apt-get -q install -y --no-install-recommends "$@" >&2
}

# A command of that name may be a version manager's shim that only fails; `uv cache dir` also refuses a uv too old for pyproject.toml.
uv_runs() { "$1" cache dir >/dev/null 2>&1; }

find_uv() {
    PATH="$PWD/.uv/bin:$PATH"
    export PATH
    uv_runs uv || uv_runs "$PWD/.uv/bin/uv"
}

# `--target` installs beside, not into, the system's Python, so an externally managed one (PEP 668) allows it.
install_uv() {
    say "installing uv into .uv/"
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip ||
        fail "uv is missing and python3 has no pip to fetch it with; run: sudo apt-get install -y python3-pip"
    rm -rf .uv
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --target .uv 'uv>=0.9' >&2 ||
        fail "uv could not be installed; see above"
    find_uv || fail "uv was installed into .uv/ but does not run there"
}

has_library() { PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null | grep -q "$1"; }

install_rendering_libraries() {
    missing=
    has_library libOSMesa.so || missing="$missing libosmesa6"
    has_library libEGL.so.1 || missing="$missing libegl1"
    has_library libGL.so.1 || missing="$missing libgl1"
    [ -n "$missing" ] || return 0
    # One by one: newer distributions no longer carry OSMesa, and EGL alone is enough.
    for package in $missing; do apt_install "$package" || true; done
    has_library libOSMesa.so || has_library libEGL.so.1 ||
        fail "MuJoCo cannot render without these libraries; run: sudo apt-get install -y$missing"
}

find_uv || install_uv
# Compiled once here: processes that may not write bytecode (PYTHONDONTWRITEBYTECODE) would each compile it all.
uv sync --quiet --locked --compile-bytecode "$@" || fail "the locked environment could not be installed; see above"
[ "$(uname)" != Linux ] || install_rendering_libraries
