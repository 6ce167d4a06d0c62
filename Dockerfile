# CPU image: installs the package and trains the demo model when run.
#   docker build -t linpass . && docker run --rm -v "$PWD/out:/out" linpass
FROM python:3.11-slim

RUN apt-get update && apt-get install --no-install-recommends -y make && rm -rf /var/lib/apt/lists/*
WORKDIR /linpass
COPY . .
ARG TORCH=torch==2.13.0
RUN make setup VENV=/venv TORCH="$TORCH"
ENV PATH="/venv/bin:$PATH" HF_HUB_OFFLINE=1
WORKDIR /out
CMD ["linpass", "train"]
