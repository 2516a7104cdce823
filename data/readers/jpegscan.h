/* The entropy code of a baseline JPEG, read in libjpeg's place. */

#ifndef JPEGSCAN_H
#define JPEGSCAN_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <jpeglib.h>

#if JPEG_LIB_VERSION >= 70
#define DCT_WIDTH(component) ((component)->DCT_h_scaled_size)
#else
#define DCT_WIDTH(component) ((component)->DCT_scaled_size)
#endif

#define SCAN_COMPONENTS 3
#define SCAN_SLACK 512 /* zero bytes behind the code: a block takes at most 64 times 31 bits */

struct Codes;

/* Bits on their way: `count` of them in `bits`, the next one on top. After a refill there are 56 or more. */
typedef struct {
    uint64_t bits;
    const unsigned char *next;
    unsigned count;
} Bits;

/* One scan. from, stop: of its code what is still to come; bytes, end: what is being read, up to `marker`, without the stuffed zeros;
   room: what that may fill; now: where reading is. interval: MCUs between restarts, or 0; due: to the next one; restarts so far. */
typedef struct {
    const unsigned char *from, *stop;
    unsigned char *bytes, *end;
    int marker;
    size_t room;
    Bits now;
    uint32_t interval, due, restarts;
    int32_t dc[SCAN_COMPONENTS];
    int blocks;                                 /* of an MCU */
    int component[D_MAX_BLOCKS_IN_MCU];         /* of each block */
    int pixels[D_MAX_BLOCKS_IN_MCU];            /* whether more than its mean is wanted, where its MCU is */
    const struct Codes *dc_codes[D_MAX_BLOCKS_IN_MCU], *ac_codes[D_MAX_BLOCKS_IN_MCU];
    uint32_t column, columns, first, last, left; /* MCUs: the next one, a row, the first and last wanted of a row, all to come */
    jmp_buf *escape;
} Scan;

#define SCAN_STRANGE 2 /* what longjmp brings to `escape` where the code is not plainly whole */

/* After jpeg_start_decompress: from here on this file reads the code, and gives libjpeg the coefficients of the rows that it asks
   for. 0: not a scan of the plain kind, or no memory, and libjpeg goes on as ever. */
int scan_take(Scan *scan, j_decompress_ptr c, jmp_buf *escape);

/* Of the MCUs first to last of every row alone. */
void scan_want(Scan *scan, uint32_t first, uint32_t last);

/* Reads what libjpeg did not ask for. Comes back if the scan is whole and ends where its last block does. */
void scan_finish(Scan *scan);

#endif
