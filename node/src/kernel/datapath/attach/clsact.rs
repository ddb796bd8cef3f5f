//! Filters of the clsact qdisc, for kernels without TCX: which there are, and in which order. And what else rtnetlink
//! says of programs on an interface.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact};
use aya::programs::{Link, ProgramError, SchedClassifier, TcAttachType};
use ebpf_common::EGRESS;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use crate::kernel::datapath::attach::{Hook, Owner};

/// The first preference: filters of others come after ours.
const PREFERENCE: u16 = 1;

/// One filter of an interface, in the order in which they run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    preference: u16,
    handle: u32,
    /// `None`: it is no BPF program.
    program: Option<u32>,
    /// The program's, or the filter's kind.
    name: Vec<u8>,
}

impl Filter {
    pub(crate) fn program(&self) -> Option<u32> {
        self.program
    }

    /// The program's name, or the kind of a filter that is none.
    pub(crate) fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Its handle, if it is the owner's.
    fn of(&self, owner: &Owner) -> Option<TcHandle> {
        // The filter's name is the program's.
        let ours = self.preference == PREFERENCE && self.program.is_some() && self.name == owner.program.as_bytes();
        owner.handles.into_iter().find(|handle| ours && self.handle == u32::from(*handle))
    }
}

/// Puts the program where its owner's is, in place and at once, or makes its place ahead of everybody else.
pub(crate) fn attach(program: &mut SchedClassifier, hook: &Hook<'_>) -> Result<(), ProgramError> {
    let Hook { interface, index, direction, owner } = *hook;
    let kind = attach_type(direction);
    let filters = filters(index, direction)?;
    let ours: Vec<_> = filters.iter().map(|filter| filter.of(owner)).collect();
    let in_place = ours.iter().take(if owner.insists { 1 } else { usize::MAX }).find_map(|handle| *handle);
    let (link, kept) = if let Some(handle) = in_place {
        // Without NLM_F_CREATE the kernel replaces the program of that handle.
        let link = SchedClassifierLink::attached(interface, kind, PREFERENCE, handle, None)?;
        (program.attach_to_link(link)?, handle)
    } else {
        match qdisc_add_clsact(interface) {
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            result => result?,
        }
        let taken = |handle| ours.contains(&Some(handle));
        let handle = if taken(owner.handles[0]) { owner.handles[1] } else { owner.handles[0] };
        let options = NlOptions { priority: PREFERENCE, handle, classid: None };
        (program.attach_with_options(interface, kind, TcAttachOptions::Netlink(options))?, handle)
    };
    // Dropping it would take the filter off, also when the agent ends as it should.
    std::mem::forget(program.take_link(link)?);
    for handle in ours.into_iter().flatten().filter(|handle| *handle != kept) {
        SchedClassifierLink::attached(interface, kind, PREFERENCE, handle, None)?.detach()?;
    }
    Ok(())
}

/// Takes the owner's filters off; `false`: there are none.
pub(crate) fn detach(hook: &Hook<'_>) -> Result<bool, ProgramError> {
    let Hook { interface, index, direction, owner } = *hook;
    let ours: Vec<TcHandle> = filters(index, direction)?.iter().filter_map(|filter| filter.of(owner)).collect();
    for handle in &ours {
        SchedClassifierLink::attached(interface, attach_type(direction), PREFERENCE, *handle, None)?.detach()?;
    }
    Ok(!ours.is_empty())
}

pub(crate) fn attach_type(direction: u32) -> TcAttachType {
    if direction == EGRESS { TcAttachType::Egress } else { TcAttachType::Ingress }
}

const TC_H_CLSACT: u32 = 0xffff_0000;
const TC_H_MIN_INGRESS: u32 = 0xfff2;
const TC_H_MIN_EGRESS: u32 = 0xfff3;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
/// Bytes of `nlmsghdr`, of `tcmsg` and of `ifinfomsg`.
const HEADER: usize = 16;
const TC_MESSAGE: usize = 20;
const LINK_MESSAGE: usize = 16;

/// The filters of an interface in one direction. None where there is no clsact qdisc.
pub(crate) fn filters(index: u32, direction: u32) -> io::Result<Vec<Filter>> {
    let parent = TC_H_CLSACT | if direction == EGRESS { TC_H_MIN_EGRESS } else { TC_H_MIN_INGRESS };
    // Family, interface, handle, parent, info.
    let body = [0u32, index, 0, parent, 0].map(u32::to_ne_bytes).concat();
    match ask(RTM_GETTFILTER, libc::NLM_F_DUMP, &body)? {
        Ok(messages) => {
            let of_kind = messages.iter().filter(|(kind, _)| *kind == RTM_NEWTFILTER);
            Ok(of_kind.filter_map(|(_, body)| filter(body)).collect())
        }
        // The interface has no such qdisc.
        Err(libc::EINVAL | libc::ENOENT) => Ok(Vec::new()),
        Err(code) => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Ids of the XDP programs of an interface: one for each mode at most, native first.
pub(crate) fn xdp_programs(index: u32) -> io::Result<Vec<u32>> {
    // Family and kind, interface, flags, mask of changes.
    let body = [0u32, index, 0, 0].map(u32::to_ne_bytes).concat();
    let messages = ask(RTM_GETLINK, 0, &body)?.map_err(io::Error::from_raw_os_error)?;
    let link = messages.iter().find(|(kind, _)| *kind == RTM_NEWLINK);
    let xdp = link.and_then(|(_, body)| attribute(body.get(LINK_MESSAGE..)?, IFLA_XDP)).unwrap_or_default();
    let of_mode = |mode| attribute(xdp, mode).and_then(|bytes| word(bytes, 0));
    Ok([IFLA_XDP_DRV_PROG_ID, IFLA_XDP_SKB_PROG_ID, IFLA_XDP_HW_PROG_ID].into_iter().filter_map(of_mode).collect())
}

/// Answers' kinds and what follows their headers, or the error number that the kernel answers with.
type Answers = Result<Vec<(u16, Vec<u8>)>, i32>;

/// Asks rtnetlink. Without `NLM_F_DUMP` there is one answer. A question that could not be put is no answer.
fn ask(kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<Answers> {
    let socket: OwnedFd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(HEADER + body.len());
    request.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    request.extend([1u32, 0].map(u32::to_ne_bytes).concat()); // sequence, port
    request.extend(body);
    send(socket.as_raw_fd(), &request, MsgFlags::empty())?;

    let mut messages = Vec::new();
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some(size) =
            word(rest, 0).map(|size| size as usize).filter(|size| (HEADER..=rest.len()).contains(size))
        {
            let message = &rest[..size];
            match half(message, 4).map(i32::from) {
                Some(libc::NLMSG_DONE) => return Ok(Ok(messages)),
                Some(libc::NLMSG_ERROR) => {
                    let code = word(message, HEADER).unwrap_or(0) as i32;
                    return Ok(Err(-code));
                }
                Some(kind) => messages.push((kind as u16, message[HEADER..].to_vec())),
                None => {}
            }
            if flags & libc::NLM_F_DUMP == 0 && !messages.is_empty() {
                return Ok(Ok(messages));
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// `None`: the head of a list of filters, not one of them.
fn filter(message: &[u8]) -> Option<Filter> {
    let handle = word(message, 8)?;
    let info = word(message, 16)?;
    let attributes = message.get(TC_MESSAGE..)?;
    let kind = attribute(attributes, TCA_KIND)?;
    let options = attribute(attributes, TCA_OPTIONS)?;
    if handle == 0 {
        return None;
    }
    let is_bpf = kind == b"bpf\0";
    let of_bpf = |wanted| attribute(options, wanted).filter(|_| is_bpf);
    let name = of_bpf(TCA_BPF_NAME).unwrap_or(kind);
    Some(Filter {
        preference: (info >> 16) as u16,
        handle,
        program: of_bpf(TCA_BPF_ID).and_then(|bytes| word(bytes, 0)),
        name: name.strip_suffix(b"\0").unwrap_or(name).to_vec(),
    })
}

fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    const TYPE: u16 = 0x3fff;
    loop {
        let size = usize::from(half(attributes, 0)?);
        let kind = half(attributes, 2)? & TYPE;
        let payload = attributes.get(4..size)?;
        if kind == wanted {
            return Some(payload);
        }
        attributes = attributes.get(size.next_multiple_of(4)..)?;
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
