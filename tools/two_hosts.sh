#!/bin/sh
# Two hosts made of network namespaces, one rank on each, must give the tokens of one process with two groups.
#     sudo tools/two_hosts.sh [CHECKPOINT]           (weights/mixtral-tiny where nothing is named)
cd "$(dirname "$0")/.." || exit 2
python=.venv/bin/python
end() { ip netns del popengine0 2>/dev/null; ip netns del popengine1 2>/dev/null; rm -rf "$out"; }
out=$(mktemp -d)
trap end EXIT
if ! ip netns add popengine0 || ! ip netns add popengine1; then
    echo "skipped: network namespaces cannot be made here (they need root and iproute2)"
    exit 0
fi
ip link add popengine0 netns popengine0 type veth peer name popengine1 netns popengine1
for host in 0 1; do
    ip -n popengine$host link set lo up
    ip -n popengine$host addr add 10.99.0.$((host + 1))/24 dev popengine$host
    ip -n popengine$host link set popengine$host up
done
set -- -m popengine.generate --ckpt "${1:-weights/mixtral-tiny}" --dtype float32 --paper --prune-ratio 0.4 -n 24 \
    --ignore-eos --quiet --prompt "sort 52713=12357; sort 9140=0149; sort 73150?"
for host in 1 0; do
    ip netns exec popengine$host env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=popengine$host \
        $python -m torch.distributed.run --nnodes 2 --node-rank $host --nproc-per-node 1 \
        --master-addr 10.99.0.1 --master-port 29400 "$@" > "$out/$host" &
done
wait
$python "$@" --groups 2 > "$out/alone"
cat "$out/0"
cmp "$out/0" "$out/alone" && echo "two hosts and one process give the same text"
