#!/usr/bin/env bash
# Builds the functions' images from this project and deploys them to the Nuclio of a CVAT on this machine.
#
#   deploy.sh cpu|gpu [FUNCTION ...]
#
# FUNCTION is sam2 (the default), sam2-everything, sam1, remote or remote-sam1.
# Environment: MODEL           another network of the catalogue for sam2 and sam2-everything (sam2.1_hiera_small …)
#              SAM_URI         the server to which remote forwards requests
#              SAM_TIMEOUT_S   its timeout in whole seconds; the function's own one is set to 5 s more
#              CVAT_NETWORK    the Docker network of CVAT (default: cvat_cvat)
#              TORCH           the build of torch on a GPU: cu130 (the default), or cu126 for Volta, Pascal and Maxwell
#              TORCH_INDEX     as in docker/Dockerfile
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
network="${CVAT_NETWORK:-cvat_cvat}"

fail() { # reason, remedy
    printf 'error: %s\n  %s\n' "$1" "$2" >&2
    exit "${3:-1}"
}

# The folder and the yaml of a function.
folder_of() {
    case "$1" in
        sam2 | sam2-everything) echo sam2 ;;
        sam1) echo sam1 ;;
        remote | remote-sam1) echo remote ;;
        *) return 1 ;;
    esac
}

config_of() { # function, kind
    case "$1" in
        sam2 | sam1) echo "function-$2.yaml" ;;
        sam2-everything) echo "function-detector-$2.yaml" ;;
        remote) echo function.yaml ;;
        remote-sam1) echo function-sam1.yaml ;;
    esac
}

# This machine's address as the function's container sees it: only Docker Desktop knows host.docker.internal in every one.
gateway() {
    local address
    address="$(docker network inspect --format '{{(index .IPAM.Config 0).Gateway}}' "$network" 2>/dev/null)" || true
    echo "${address:-172.17.0.1}"
}

check_machine() {
    command -v docker >/dev/null || fail "docker is not installed" "https://docs.docker.com/engine/install/"
    command -v nuctl >/dev/null || fail "nuctl is not installed" \
        "take the release that CVAT's nuclio container runs (docker ps shows it): https://github.com/nuclio/nuclio/releases"
    docker info >/dev/null 2>&1 || fail "the docker daemon cannot be reached" "start it, or join the group docker: sudo usermod -aG docker \"\$USER\""
    docker network inspect "$network" >/dev/null 2>&1 || fail "there is no Docker network $network: CVAT does not run here" \
        "start CVAT with components/serverless/docker-compose.serverless.yml, or set CVAT_NETWORK to its network"
}

build_base() { # kind, functions …
    local kind="$1" torch=cpu
    shift
    [ "$kind" = cpu ] || torch="${TORCH:-cu130}" # the tags of docker/compose.yaml
    case " $* " in
        *" sam"*)
            docker build -f "$root/docker/Dockerfile" --build-arg "TORCH=$torch" \
                --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" -t "sam-poll:$torch" "$root"
            docker build -f "$here/Dockerfile" --build-arg "BASE=sam-poll:$torch" -t "sam-poll-nuclio:$kind" "$root"
            ;;
    esac
    case " $* " in
        *" remote"*) docker build -f "$here/Dockerfile.remote" -t sam-poll-nuclio:remote "$root" ;;
    esac
}

# Put the values of the environment into the function's yaml.
prepare() { # function, yaml
    local wanted
    case "$1" in
        sam2*) [ -z "${MODEL:-}" ] || replace "sam2\\.1_hiera_[a-z]*" "$MODEL" "$2" ;;
        remote*)
            replace "http://172\\.17\\.0\\.1:8000/" "$SAM_URI" "$2"
            wanted="${SAM_TIMEOUT_S:-}"
            if [ -n "$wanted" ]; then
                replace '"25"' "\"$wanted\"" "$2"
                replace '"30s"' "\"$((wanted + 5))s\"" "$2" # Nuclio's reason says less than ours
            fi
            ;;
    esac
}

replace() { # pattern, text, file
    local text
    text="$(printf '%s' "$2" | sed 's/[&|\\]/\\&/g')"
    sed "s|$1|$text|g" "$3" >"$3.new"
    mv "$3.new" "$3"
}

deploy() { # function, kind
    local folder yaml
    folder="$work/$1"
    cp -R "$here/$(folder_of "$1")" "$folder"
    yaml="$folder/function.yaml.wanted"
    mv "$folder/$(config_of "$1" "$2")" "$yaml"
    rm -f "$folder"/*.yaml
    mv "$yaml" "$folder/function.yaml"
    prepare "$1" "$folder/function.yaml"
    printf 'deploying %s (%s)\n' "$1" "$2"
    nuctl deploy --project-name cvat --path "$folder" --file "$folder/function.yaml" --platform local \
        --platform-config "{\"attributes\": {\"network\": \"$network\"}}"
}

kind="${1:-}"
case "$kind" in
    cpu | gpu) shift ;;
    *) fail "the first argument must be cpu or gpu" "deploy_cpu.sh [FUNCTION ...], or deploy_gpu.sh [FUNCTION ...]" 2 ;;
esac
[ $# -gt 0 ] || set -- sam2
for name in "$@"; do
    folder_of "$name" >/dev/null || fail "there is no function $name" "sam2, sam2-everything, sam1, remote, remote-sam1" 2
    case "$name" in
        remote*)
            [ -n "${SAM_URI:-}" ] || fail "SAM_URI is not set" \
                "SAM_URI=http://$(gateway):8000/ names a SAM server on this machine as the container sees it" 2
            case "${SAM_TIMEOUT_S:-1}" in
                *[!0-9]* | 0*) fail "SAM_TIMEOUT_S must be a number of whole seconds" "leave it out for 25" 2 ;;
            esac
            ;;
    esac
done

check_machine
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
build_base "$kind" "$@"
nuctl create project cvat --platform local >/dev/null 2>&1 || true # it may exist already; any other problem makes the next step fail
for name in "$@"; do
    deploy "$name" "$kind"
done
nuctl get function --platform local
