;; A core module of WASI's first preview: `print TEXT`, `exit CODE`, `table ENTRIES`, `spin`; without a command it prints "ok".
;; The name of the program may come first. Memory: 0 argc, 4 size of the strings, 8 an iovec, 16 bytes written, 24 "\n",
;; 32 "ok", 1024 the pointers, 4096 the strings.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 1)
  (table $entries 0 funcref)
  (data (i32.const 24) "\n")
  (data (i32.const 32) "ok\00")

  ;; The string that argument $index points to, or an empty one.
  (func $argument (param $index i32) (result i32)
    (if (i32.ge_u (local.get $index) (i32.load (i32.const 0)))
      (then (return (i32.const 34))))
    (i32.load (i32.add (i32.const 1024) (i32.shl (local.get $index) (i32.const 2)))))

  (func $length (param $text i32) (result i32)
    (local $end i32)
    (local.set $end (local.get $text))
    (loop $next
      (if (i32.load8_u (local.get $end))
        (then
          (local.set $end (i32.add (local.get $end) (i32.const 1)))
          (br $next))))
    (i32.sub (local.get $end) (local.get $text)))

  (func $write (param $text i32) (param $length i32)
    (i32.store (i32.const 8) (local.get $text))
    (i32.store (i32.const 12) (local.get $length))
    (drop (call $fd_write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 16))))

  (func $print (param $text i32)
    (call $write (local.get $text) (call $length (local.get $text)))
    (call $write (i32.const 24) (i32.const 1)))

  (func $number (param $text i32) (result i32)
    (local $value i32)
    (loop $next
      (if (i32.load8_u (local.get $text))
        (then
          (local.set $value
            (i32.add
              (i32.mul (local.get $value) (i32.const 10))
              (i32.sub (i32.load8_u (local.get $text)) (i32.const 48))))
          (local.set $text (i32.add (local.get $text) (i32.const 1)))
          (br $next))))
    (local.get $value))

  (func (export "_start")
    (local $index i32)
    (local $word i32)
    (if (call $args_sizes_get (i32.const 0) (i32.const 4))
      (then (unreachable)))
    (if (call $args_get (i32.const 1024) (i32.const 4096))
      (then (unreachable)))
    (loop $next
      ;; A command is known by its first four letters, as a little-endian number.
      (local.set $word (i32.load (call $argument (local.get $index))))
      (local.set $index (i32.add (local.get $index) (i32.const 1)))
      (if (i32.eq (local.get $word) (i32.const 0x6e697270)) ;; prin
        (then
          (call $print (call $argument (local.get $index)))
          (return)))
      (if (i32.eq (local.get $word) (i32.const 0x74697865)) ;; exit
        (then (call $proc_exit (call $number (call $argument (local.get $index))))))
      (if (i32.eq (local.get $word) (i32.const 0x6c626174)) ;; tabl
        (then
          (if (i32.eq (table.grow $entries (ref.null func) (call $number (call $argument (local.get $index)))) (i32.const -1))
            (then (unreachable)))))
      (if (i32.eq (local.get $word) (i32.const 0x6e697073)) ;; spin
        (then (loop $forever (br $forever))))
      (br_if $next (i32.lt_u (local.get $index) (i32.load (i32.const 0)))))
    (call $print (i32.const 32)))
)
