# impart-serve in a container: non-root, offline, health-checked.
#
#   CUDA   docker build -t impart-serve .
#          docker run --gpus all ...
#   CPU    docker build -t impart-serve:cpu --build-arg TORCH_INDEX=<index> --build-arg COMPILE=1 .
#          (the index that pytorch.org's "Get Started" page names for CPU; any other build likewise)
#          COMPILE=1 compiles the CPU kernels for the kind of CPU that builds the image; on another
#          kind torch serves until they are compiled. A volume at /var/cache/impart keeps those.
#   run    docker run -p 8000:8000 -e IMPART_API_KEY=KEY -v /srv/base:/models/base:ro \
#              -v /srv/deltas:/models/deltas:ro impart-serve
#          (user 10001 must be able to read both: chmod -R a+rX, or docker run --user OWNER)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# TORCH chooses the version, TORCH_INDEX the build; without it pip's own index gives the CUDA one.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# torch first and in a layer of its own: gigabytes that change least often.
# hadolint ignore=DL3013
RUN pip install "${TORCH}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY compressor compressor
COPY server server
RUN pip install -c constraints.txt ".[otel,postgres,redis]"

FROM python:${PYTHON}-slim AS run
# libgomp1: torch's CPU threads.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin impart
COPY --from=build /opt/venv /opt/venv
# The server never reaches out: models come from the mounted folders. Triton's kernels go to /tmp,
# numba's to a folder that the image fills; where that is read-only and has none for this kind of
# CPU, to /tmp as well.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HF_HOME=/tmp/huggingface \
    TRITON_CACHE_DIR=/tmp/triton \
    NUMBA_CACHE_DIR=/var/cache/impart \
    IMPART_HOST=0.0.0.0 \
    IMPART_PORT=8000 \
    IMPART_BASE=/models/base \
    IMPART_DELTAS=/models/deltas
RUN install -d -o 10001 -g 10001 /var/cache/impart \
    && install -d -m 0700 -o 10001 -g 10001 /var/lib/impart
USER 10001:10001
WORKDIR /tmp
ARG COMPILE=
RUN if [ -n "${COMPILE}" ]; then impart-serve compile; fi
EXPOSE 8000
# Loading a large base takes minutes; /health tells alive, /health/ready tells "send traffic".
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['IMPART_PORT'] + '/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["impart-serve"]
