#!/bin/bash
# The first process of a test machine: makes it habitable, runs one program, says how that ended, stops the machine.
# ttyS0 is the kernel's console, ttyS1 the program's output, ttyS2 what the host is told (`up SECONDS`, `exit STATUS`).

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/opt/busybox
export HOME=/root TERM=dumb NO_COLOR=1
umask 022

mount -t devtmpfs dev /dev
exec </dev/null >/dev/console 2>&1
exec 7>/dev/ttyS1 8>/dev/ttyS2
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo

stop() {
    sync
    exec 7>&- 8>&- # closing a serial line waits until it is sent
    reboot -f
}

die() {
    echo "failed $1" >&8
    stop
}

mkdir -p /dev/pts /dev/shm /proc /sys /run /tmp /root /var/lib /var/log
mount -t proc proc /proc || die "to mount /proc"
mount -t sysfs sys /sys || die "to mount /sys"
mount -t devpts pts /dev/pts || die "to mount /dev/pts"
mount -t tmpfs -o mode=1777 shm /dev/shm || die "to mount /dev/shm"
mount -t tmpfs -o mode=0755 run /run || die "to mount /run"
mkdir /new
mount -t tmpfs -o mode=1777 tmp /new || die "to mount /tmp"
cp -a /tmp/. /new && mount --move /new /tmp || die "to fill /tmp" # what the host sent there stays visible
mount -t bpf bpf /sys/fs/bpf || die "to mount /sys/fs/bpf"
mount -t cgroup2 cgroup /sys/fs/cgroup || die "to mount /sys/fs/cgroup"
ln -s /proc/self/fd /dev/fd
ln -sf /run /var/run
# bash cannot leave its own mounts to others; nodes make theirs private.
mount --make-rprivate /

while read -r module; do
    modprobe "$module" || die "to load the module $module"
done </etc/vm/modules
[[ -c /dev/net/tun ]] || die "to find /dev/net/tun"

ip link set lo up || die "to set lo up"
hostname vm
# The clock of the machine is the host's by its RTC; where that failed, certificates would not be valid yet.
read -r now </etc/vm/now
(($(date +%s) >= now)) || date -s "@$now" >/dev/null

mapfile -d '' -t environment </etc/vm/environment
mapfile -d '' -t argv </etc/vm/argv
read -r directory </etc/vm/directory
read -r uptime _ </proc/uptime
echo "up $uptime" >&8

cd "$directory" || die "to enter $directory"
# A pipe, so that the program does not take a serial line for a terminal. The program does not get our descriptors.
mkfifo /run/vm-output
cat </run/vm-output >&7 &
relay=$!
env "${environment[@]}" "${argv[@]}" >/run/vm-output 2>&1 7>&- 8>&-
status=$?

# Processes that the program left behind, one a line. Threads of the kernel have no command line.
left() {
    local process words
    for process in /proc/[0-9]*; do
        [[ ${process#/proc/} == @(1|"$relay"|"$BASHPID") ]] && continue
        mapfile -d '' -t words 2>/dev/null <"$process/cmdline" && ((${#words[@]})) && echo "left ${words[*]}"
    done
}
# They get a moment, for ends that are under way, before the host is told.
for ((round = 0; round < 30; round++)); do
    [[ $(left) ]] || break
    sleep 0.1
done
remaining=$(left)
if [[ $remaining ]]; then
    echo "$remaining" >&8 # they may hold the pipe open for ever
else
    wait $relay
fi
echo "exit $status" >&8
stop
