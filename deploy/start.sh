#!/bin/sh
# The image's entry point: `serve` serves the Bento with its own versions, `store` those of the store in BENTOML_HOME, the
# name of a runner that one alone, and anything else is run as it is.
set -eu

if [ ! -w "$BENTOML_HOME" ]; then
    echo "$BENTOML_HOME cannot be written by user $(id -u): mount a writable folder there (a tmpfs, an emptyDir)." >&2
    exit 1
fi
# A mount hides what an image has in its place, so BENTOML_HOME begins empty: the models of the image are linked into it.
if [ "${1-}" != store ] && [ -n "$(ls /bento/models)" ] && [ ! -e "$BENTOML_HOME/models" ]; then
    ln -s /bento/models "$BENTOML_HOME/models"
fi

# torch is in the image for a GPU alone.
if [ "${OOD_DEVICE-auto}" = auto ] && [ ! -e /dev/nvidiactl ] && ls -d /opt/ood/lib/python3*/site-packages/torch >/dev/null 2>&1; then
    echo "WARNING: this image is for an NVIDIA GPU, but this container was given none: it runs on the CPU." >&2
fi

alone() {
    service=$1
    shift
    exec bentoml serve "ood_runners.$service" --working-dir /bento/src --host 0.0.0.0 --timeout-keep-alive 75 "$@"
}

what=$1
shift
case $what in
    serve) exec bentoml serve /bento --host 0.0.0.0 --timeout-keep-alive 75 "$@" ;;
    # Not the Bento, whose arguments overrule the environment: it would serve the versions that it was built with.
    store) exec bentoml serve service:OODService --working-dir /bento/src --host 0.0.0.0 --timeout-keep-alive 75 "$@" ;;
    resnet50) alone resnet50_runner:ResNet50Runner "$@" ;;
    vae) alone vae_runner:VAERunner "$@" ;;
    nearest_neighbour) alone nearest_neighbour_runner:NearestNeighbourRunner "$@" ;;
    mahalanobis) alone mahalanobis_runner:MahalanobisRunner "$@" ;;
    *) exec "$what" "$@" ;;
esac
