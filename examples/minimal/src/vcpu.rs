//! The vCPU: its thread, its pause, its state.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};
use vmstate::{Device, DeviceError, VmState};

use crate::guest::{ENTRY, SERIAL};

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Paused,
    Running,
    /// The thread is to leave the guest.
    Pausing,
}

/// A vCPU, shared between its thread and whoever pauses it.
#[derive(Debug)]
pub struct Vcpu {
    fd: Mutex<VcpuFd>,
    run: Mutex<Run>,
    changed: Condvar,
    /// Nothing of the guest's is printed: another process prints it.
    pub silent: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vcpu {
    /// Starts the thread of a paused vCPU at the guest's entry.
    pub fn start(fd: VcpuFd) -> Result<Arc<Self>, DeviceError> {
        register_signal_handler(SIGRTMIN(), nothing)?;
        let mut sregs = fd.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs)?;
        fd.set_regs(&kvm_regs {
            rip: ENTRY.into(),
            rflags: 2,
            ..kvm_regs::default()
        })?;
        let vcpu = Arc::new(Self {
            fd: Mutex::new(fd),
            run: Mutex::new(Run::Paused),
            changed: Condvar::new(),
            silent: AtomicBool::new(false),
        });
        let (in_thread, kicks) = (Arc::clone(&vcpu), Arc::clone(&vcpu));
        let thread = thread::spawn(move || in_thread.work());
        // KVM_RUN returns for a signal. One that comes just before it is lost, so it is sent again.
        thread::spawn(move || {
            loop {
                let mut run = lock(&kicks.run);
                while *run != Run::Pausing {
                    run = (kicks.changed.wait(run)).unwrap_or_else(PoisonError::into_inner);
                }
                drop(run);
                let _ = thread.kill(SIGRTMIN());
                thread::sleep(Duration::from_micros(200));
            }
        });
        Ok(vcpu)
    }

    fn work(&self) {
        loop {
            let mut run = lock(&self.run);
            while *run != Run::Running {
                if *run == Run::Pausing {
                    *run = Run::Paused;
                    self.changed.notify_all();
                }
                run = (self.changed.wait(run)).unwrap_or_else(PoisonError::into_inner);
            }
            drop(run);
            self.enter();
        }
    }

    /// Runs the guest until it is to pause.
    fn enter(&self) {
        let mut fd = lock(&self.fd);
        loop {
            match fd.run() {
                Ok(VcpuExit::IoOut(SERIAL, bytes)) if !self.silent.load(Ordering::Relaxed) => {
                    let mut out = std::io::stdout().lock();
                    let _ = out.write_all(bytes).and_then(|()| out.flush());
                }
                Ok(VcpuExit::IoOut(..)) => {}
                // Only here is no access of the guest's half done.
                Err(e) if e.errno() == libc::EINTR => {
                    if *lock(&self.run) != Run::Running {
                        return;
                    }
                }
                Err(e) if e.errno() == libc::EAGAIN => {}
                other => {
                    eprintln!("the guest cannot go on: {other:?}");
                    std::process::exit(1);
                }
            }
        }
    }

    // ANCHOR: pause
    /// Pauses the guest, and returns when it stands still.
    pub fn pause(&self) {
        let mut run = lock(&self.run);
        if *run == Run::Running {
            *run = Run::Pausing;
        }
        self.changed.notify_all();
        while *run != Run::Paused {
            run = (self.changed.wait(run)).unwrap_or_else(PoisonError::into_inner);
        }
    }
    // ANCHOR_END: pause

    /// Resumes the guest.
    pub fn resume(&self) {
        *lock(&self.run) = Run::Running;
        self.changed.notify_all();
    }
}

// ANCHOR: state
/// The registers: what travels of the vCPU.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "vcpu", version = 1)]
pub struct VcpuState {
    /// rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags.
    general: [u64; 10],
    /// Base, limit and selector of cs, ds, es, fs, gs, ss.
    bases: [u64; 6],
    limits: [u32; 6],
    selectors: [u16; 6],
    /// Base and limit of the interrupt table.
    idt: u64,
    idt_limit: u16,
}
// ANCHOR_END: state

/// A vCPU in the device tree.
#[derive(Debug)]
pub struct VcpuDevice(pub Arc<Vcpu>);

impl Device for VcpuDevice {
    type State = VcpuState;

    // ANCHOR: save
    fn save(&mut self) -> Result<VcpuState, DeviceError> {
        let fd = lock(&self.0.fd);
        let (r, s) = (fd.get_regs()?, fd.get_sregs()?);
        let segments = [s.cs, s.ds, s.es, s.fs, s.gs, s.ss];
        Ok(VcpuState {
            general: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.rip, r.rflags,
            ],
            bases: segments.map(|s| s.base),
            limits: segments.map(|s| s.limit),
            selectors: segments.map(|s| s.selector),
            idt: s.idt.base,
            idt_limit: s.idt.limit,
        })
    }
    // ANCHOR_END: save

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn install(&mut self, state: VcpuState) -> Result<(), DeviceError> {
        let fd = lock(&self.0.fd);
        let mut sregs: kvm_sregs = fd.get_sregs()?;
        let segment = |i: usize, s: kvm_segment| kvm_segment {
            base: state.bases[i],
            limit: state.limits[i],
            selector: state.selectors[i],
            ..s
        };
        (sregs.cs, sregs.ds) = (segment(0, sregs.cs), segment(1, sregs.ds));
        (sregs.es, sregs.fs) = (segment(2, sregs.es), segment(3, sregs.fs));
        (sregs.gs, sregs.ss) = (segment(4, sregs.gs), segment(5, sregs.ss));
        sregs.idt = kvm_dtable {
            base: state.idt,
            limit: state.idt_limit,
            ..sregs.idt
        };
        fd.set_sregs(&sregs)?;
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, rip, rflags] = state.general;
        Ok(fd.set_regs(&kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            rip,
            rflags,
            ..kvm_regs::default()
        })?)
    }
}
